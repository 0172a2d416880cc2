//! `-L`: what a server exports, in the words of the other program.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use infill_io::{Address, Reactors, connector};
use infill_nbd::proto::{Mode, TransmissionFlags};
use infill_nbd::{ClientTls, ListedExport, list_exports};
use infill_qmp::ObjectOptions;

use crate::objects::Objects;

/// How long a server may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whom to ask, and how.
pub(super) struct Asked {
    pub(super) socket: Option<PathBuf>,
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) objects: Vec<String>,
    pub(super) tls_creds: Option<String>,
    pub(super) tls_hostname: Option<String>,
}

impl Asked {
    fn tls(&self) -> Result<Option<ClientTls>> {
        let Some(id) = &self.tls_creds else { return Ok(None) };
        let objects = Objects::default();
        for text in &self.objects {
            let options = ObjectOptions::members(text).and_then(ObjectOptions::read);
            objects.add(&options.map_err(|error| anyhow!(error.desc))?)?;
        }
        let host = self.socket.is_none().then_some(self.host.as_str());
        let name = self.tls_hostname.as_deref().or(host);
        Ok(Some(objects.tls(id)?.client_tls()?.for_server(name)?))
    }

    /// What there is, as text.
    pub(super) fn exports(self) -> Result<String> {
        let tls = self.tls()?;
        let (address, shown) = match &self.socket {
            Some(path) => (Address::Unix(path.clone()), path.display().to_string()),
            None => {
                let (host, port) = (self.host.clone(), self.port);
                let shown = format!("{host}:{port}");
                (Address::Tcp { host, port }, shown)
            }
        };
        let reactors = Reactors::start(1).context("starting a reactor")?;
        let listed = reactors.block_on(move || async move {
            list_exports(connector(&address).as_ref(), tls.as_ref(), PATIENCE).await
        });
        Ok(text_of(&listed.with_context(|| format!("Failed to list the exports of '{shown}'"))?))
    }
}

/// Names of flags, in the order of their bits.
const FLAGS: [(TransmissionFlags, &str); 12] = [
    (TransmissionFlags::READ_ONLY, "readonly"),
    (TransmissionFlags::SEND_FLUSH, "flush"),
    (TransmissionFlags::SEND_FUA, "fua"),
    (TransmissionFlags::ROTATIONAL, "rotational"),
    (TransmissionFlags::SEND_TRIM, "trim"),
    (TransmissionFlags::SEND_WRITE_ZEROES, "zeroes"),
    (TransmissionFlags::SEND_DF, "df"),
    (TransmissionFlags::CAN_MULTI_CONN, "multi"),
    (TransmissionFlags::SEND_RESIZE, "resize"),
    (TransmissionFlags::SEND_CACHE, "cache"),
    (TransmissionFlags::SEND_FAST_ZERO, "fast-zero"),
    (TransmissionFlags::BLOCK_STATUS_PAYLOAD, "block-status-payload"),
];

/// Names come from the server: what could steer a terminal is shown as what it is.
fn plain(text: &str) -> String {
    text.chars()
        .flat_map(|char| match char.is_control() {
            true => char.escape_default().collect::<Vec<_>>(),
            false => vec![char],
        })
        .collect()
}

fn text_of(exports: &[ListedExport]) -> String {
    let mut text = format!("exports available: {}\n", exports.len());
    for ListedExport { name, description, info, blocks, mode, contexts } in exports {
        let _ = writeln!(text, " export: '{}'", plain(name));
        if !description.is_empty() {
            let _ = writeln!(text, "  description: {}", plain(description));
        }
        if let Some(info) = info {
            let has = |(flag, name): &(TransmissionFlags, &str)| {
                info.flags.contains(*flag).then(|| format!("{name} "))
            };
            let names: String = FLAGS.iter().filter_map(has).collect();
            let _ = writeln!(text, "  size:  {}\n  flags: {:#x} ( {names})", info.size, info.flags.bits());
        }
        if let Some((min, preferred, max)) = blocks {
            let _ = writeln!(text, "  min block: {min}\n  opt block: {preferred}\n  max block: {max}");
        }
        let bits = if *mode == Mode::Extended { 64 } else { 32 };
        let _ = writeln!(text, "  transaction size: {bits}-bit");
        if !contexts.is_empty() {
            let _ = writeln!(text, "  available meta contexts: {}", contexts.len());
        }
        for context in contexts {
            let _ = writeln!(text, "   {}", plain(context));
        }
    }
    text
}
