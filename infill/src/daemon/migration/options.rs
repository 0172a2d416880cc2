//! `--migration`: where disks come and go.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use infill_io::Address;

use super::missed::{HOLD_TIME, OnHold};

/// How long a side that has restarted asks its peer before it goes on without an answer, where nothing else is said.
pub(super) const RECONNECT_TIME: Duration = Duration::from_secs(60);

/// What a daemon is told with `--migration`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where other daemons bring disks.
    pub(super) listen: Address,
    /// Where other daemons read the data of disks that have left.
    pub(super) data: Address,
    /// Where other daemons find that, if it is elsewhere for them.
    pub(super) reach: Option<Address>,
    /// Where images of disks are made that come.
    pub(super) directory: Option<PathBuf>,
    /// What becomes of reads of what is still at a source that is away.
    pub(super) on_hold: OnHold,
    /// How long they are held before anything else becomes of them.
    pub(super) hold_time: Duration,
    /// The directory of credentials that both ends show; without, nothing is encrypted.
    pub(super) tls: Option<PathBuf>,
    /// What the certificate of the server of data is for, where that is not the host of its address.
    pub(super) tls_hostname: Option<String>,
    /// How long a side that has restarted asks its peer before it goes on without an answer.
    pub(super) reconnect_time: Duration,
}

/// An address as people write it.
pub(super) fn address(text: &str) -> Result<Address> {
    match text.rsplit_once(':') {
        _ if text.starts_with('/') => Ok(Address::Unix(text.into())),
        Some((host, port)) if !host.is_empty() => {
            let port = port.parse().with_context(|| format!("{text}: a port is a number up to 65535"))?;
            let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
            Ok(Address::Tcp { host, port })
        }
        _ => bail!("{text}: give HOST:PORT, or a socket file by its whole path"),
    }
}

impl Options {
    /// Reads `listen=ADDRESS,data=ADDRESS[,reach=ADDRESS][,directory=DIR][,on-hold=hold|stop|eio][,hold-time=SECONDS][,tls-creds=DIR[,tls-hostname=NAME]][,reconnect-time=SECONDS]`.
    pub fn read(text: &str) -> Result<Options> {
        let (mut listen, mut data, mut reach, mut directory) = (None, None, None, None);
        let (mut tls, mut tls_hostname) = (None, None);
        let (mut on_hold, mut hold_time) = (OnHold::default(), HOLD_TIME);
        let mut reconnect_time = RECONNECT_TIME;
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("listen", at)) => listen = Some(address(at)?),
                Some(("data", at)) => data = Some(address(at)?),
                Some(("reach", at)) => reach = Some(address(at)?),
                Some(("directory", at)) => directory = Some(std::path::absolute(at)?),
                Some(("on-hold", word)) => on_hold = OnHold::read(word)?,
                Some(("hold-time", seconds)) => {
                    let seconds: u32 = seconds
                        .parse()
                        .with_context(|| format!("hold-time={seconds}: give whole seconds"))?;
                    hold_time = Duration::from_secs(seconds.into());
                }
                Some(("tls-creds", at)) => tls = Some(std::path::absolute(at)?),
                Some(("tls-hostname", name)) => tls_hostname = Some(name.to_owned()),
                Some(("reconnect-time", seconds)) => {
                    let parsed = seconds.parse::<u32>();
                    let parsed =
                        parsed.with_context(|| format!("reconnect-time={seconds}: give whole seconds"))?;
                    reconnect_time = Duration::from_secs(parsed.into());
                }
                Some((name, _)) => bail!(
                    "'{name}' is not known: there are listen, data, reach, directory, on-hold, hold-time, tls-creds, \
                     tls-hostname and reconnect-time"
                ),
                None => bail!("'{part}' has no value: give listen=, data= and directory="),
            }
        }
        let missing =
            |what: &str| anyhow!("{what} is missing: HOST:PORT, or a socket file by its whole path");
        let options = Options {
            listen: listen.ok_or_else(|| missing("listen="))?,
            data: data.ok_or_else(|| missing("data="))?,
            reach,
            directory,
            on_hold,
            hold_time,
            tls,
            tls_hostname,
            reconnect_time,
        };
        if options.tls_hostname.is_some() && options.tls.is_none() {
            bail!("tls-hostname is for TLS: name the directory of credentials with tls-creds=DIR");
        }
        if let Address::Tcp { host, .. } = options.reached()
            && host.parse::<IpAddr>().is_ok_and(|address| address.is_unspecified())
        {
            bail!(
                "at {host} no other host finds this one: name the address that they reach with reach=HOST:PORT"
            );
        }
        Ok(options)
    }
}

impl Options {
    /// Where other daemons find what has left.
    pub(super) fn reached(&self) -> &Address {
        self.reach.as_ref().unwrap_or(&self.data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_names_where_peers_come_and_where_they_read() {
        let read = Options::read("listen=127.0.0.1:10900,data=/run/d.sock,directory=/srv").unwrap();
        assert_eq!(read.listen, Address::Tcp { host: "127.0.0.1".into(), port: 10900 });
        assert_eq!(read.data, Address::Unix("/run/d.sock".into()));
        assert_eq!(read.directory, Some("/srv".into()));
        let read = Options::read("listen=/s,data=/t,tls-creds=/etc/pki,tls-hostname=a.example").unwrap();
        assert_eq!((read.tls, read.tls_hostname.as_deref()), (Some("/etc/pki".into()), Some("a.example")));
        assert_eq!((read.on_hold, read.hold_time), (OnHold::Hold, HOLD_TIME));
        let read = Options::read("listen=/s,data=/t,on-hold=stop,hold-time=5").unwrap();
        assert_eq!((read.on_hold, read.hold_time), (OnHold::Stop, Duration::from_secs(5)));
        let read = Options::read("listen=/s,data=0.0.0.0:1,reach=a.example:1").unwrap();
        assert_eq!(read.reached(), &Address::Tcp { host: "a.example".into(), port: 1 });
        assert_eq!(read.reconnect_time, RECONNECT_TIME);
        let read = Options::read("listen=/s,data=/t,reconnect-time=5").unwrap();
        assert_eq!(read.reconnect_time, Duration::from_secs(5));
        for (wrong, why) in [
            ("listen=1.2.3.4:5", "data= is missing"),
            ("data=/s", "listen= is missing"),
            ("listen=x,data=/s", "give HOST:PORT"),
            ("listen=h:70000,data=/s", "a port is a number"),
            ("listen=/s,data=/t,more=1", "'more' is not known"),
            ("listen=/s,data=/t,reconnect-time=soon", "give whole seconds"),
            ("listen=/s,data", "'data' has no value"),
            ("listen=/s,data=/t,on-hold=wait", "hold, stop or eio"),
            ("listen=/s,data=/t,hold-time=long", "whole seconds"),
            ("listen=/s,data=/t,tls-hostname=a", "tls-creds=DIR"),
            ("listen=/s,data=0.0.0.0:1", "reach=HOST:PORT"),
            ("listen=/s,data=[::]:1,reach=[::]:1", "reach=HOST:PORT"),
        ] {
            let told = format!("{:#}", Options::read(wrong).unwrap_err());
            assert!(told.contains(why), "{told}");
        }
    }
}
