//! The handshake: what a server and we agree on.
//!
//! Fixed newstyle; extended headers, else structured replies, else simple ones; `base:allocation` where there are
//! replies for it; GO with block sizes, else EXPORT_NAME for servers that do not know GO. An option at a time, as the
//! protocol demands: four round trips with a server of today. Every list of replies is bounded; the whole has a time
//! limit, which is the caller's.

use bytes::BytesMut;
use infill_base::{ErrorKind, IoError, MAX_TRANSFER_BYTES};
use infill_storage::stream::Connection;

use super::list::LISTING_BYTES_MAX;
use crate::proto::{
    CONTEXT_ALLOCATION, CONTEXT_BACKGROUND, ClientFlags, ExportInfo, Greeting, HandshakeFlags,
    INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_NAME, Info, Mode, OptionError, OptionReply, OptionReplyHeader,
    OptionRequest, ProtocolError, STRING_BYTES_MAX, TransmissionFlags,
};
use crate::tls::ClientTls;

/// Most replies to one option. (The protocol knows four informations; others may come.)
pub(super) const REPLIES_MAX: usize = 64;
/// Spare bytes of the receive buffer.
const RECEIVE_BYTES: usize = 4096;
/// Largest smallest request size that the protocol allows, in bytes.
const MIN_BLOCK_MAX: u32 = 64 << 10;

/// Sizes of requests to a server that was never reached, in bytes.
const EXPECTED_BLOCK_MIN: u32 = 512;
const EXPECTED_BLOCK_MAX: u32 = 64 << 10;

/// What was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) mode: Mode,
    /// Size in bytes.
    pub(super) size: u64,
    pub(super) flags: TransmissionFlags,
    /// Offsets and lengths are multiples of it, in bytes.
    pub(super) min_block: u32,
    pub(super) preferred_block: u32,
    /// Largest payload, in bytes.
    pub(super) max_block: u32,
    /// The context `base:allocation`, if the server has it.
    pub(super) allocation: Option<u32>,
    /// Whether the server wants to know what nobody waits for (`infill:background`).
    pub(super) background: bool,
    /// The export's own name, if the server tells it.
    pub(super) name: Option<String>,
    pub(super) description: Option<String>,
}

/// What the server has of the contexts that are asked for.
#[derive(Clone, Copy, Debug, Default)]
struct Chosen {
    allocation: Option<u32>,
    background: bool,
}

/// Flags whose loss is felt by whoever writes.
const NEEDED_TO_WRITE: TransmissionFlags = TransmissionFlags::SEND_FLUSH
    .union(TransmissionFlags::SEND_FUA)
    .union(TransmissionFlags::SEND_TRIM)
    .union(TransmissionFlags::SEND_WRITE_ZEROES)
    .union(TransmissionFlags::SEND_FAST_ZERO);

impl Agreed {
    /// What is known of a read-only export of that size before any server was reached: requests that each one takes.
    pub(super) fn expected(size: u64) -> Agreed {
        Agreed {
            mode: Mode::Simple,
            size,
            flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY,
            min_block: EXPECTED_BLOCK_MIN,
            preferred_block: EXPECTED_BLOCK_MAX,
            max_block: EXPECTED_BLOCK_MAX,
            allocation: None,
            background: false,
            name: None,
            description: None,
        }
    }

    /// Whether the server can write zeroes that are not sent.
    pub(super) fn write_zeroes(&self) -> bool {
        self.flags.contains(TransmissionFlags::SEND_WRITE_ZEROES)
    }

    /// Whether `now` is still what `self` was opened as: size, sizes of requests, flags that matter, and the names
    /// where both tell them. Else what is different.
    pub(super) fn same_source(&self, now: &Agreed, read_only: bool) -> Result<(), String> {
        if now.size != self.size {
            return Err(format!("it had {} bytes, it has {} now", self.size, now.size));
        }
        if now.min_block > self.min_block || now.max_block < self.max_block {
            return Err(format!(
                "it took requests of {} to {} bytes, now of {} to {}",
                self.min_block, self.max_block, now.min_block, now.max_block
            ));
        }
        if self.allocation.is_some() && now.allocation.is_none() {
            return Err(format!("it told what is zero ({CONTEXT_ALLOCATION}), it does not now"));
        }
        if !read_only {
            let missing = (self.flags & NEEDED_TO_WRITE).difference(now.flags);
            if now.flags.contains(TransmissionFlags::READ_ONLY) || !missing.is_empty() {
                return Err(format!("its flags were {:?}, they are {:?} now", self.flags, now.flags));
            }
        }
        for (before, now) in [(&self.name, &now.name), (&self.description, &now.description)] {
            if let (Some(before), Some(now)) = (before, now)
                && before != now
            {
                return Err(format!("it called itself {before:?}, it calls itself {now:?} now"));
            }
        }
        Ok(())
    }
}

/// A connection in the transmission phase.
pub(super) struct Open {
    pub(super) connection: Connection,
    /// What was received behind the handshake.
    pub(super) received: BytesMut,
    pub(super) agreed: Agreed,
}

/// Why there is no connection in the transmission phase.
#[derive(Clone, Debug)]
pub(super) enum Failed {
    /// It went away, or nobody is there.
    Lost(IoError),
    /// The server broke the protocol.
    Broke(ProtocolError),
    /// The server does not want to.
    Refused(IoError),
}

impl From<ProtocolError> for Failed {
    fn from(error: ProtocolError) -> Failed {
        Failed::Broke(error)
    }
}

impl From<IoError> for Failed {
    fn from(error: IoError) -> Failed {
        Failed::Lost(error)
    }
}

impl From<Failed> for IoError {
    fn from(failed: Failed) -> IoError {
        match failed {
            Failed::Lost(error) | Failed::Refused(error) => error,
            Failed::Broke(error) => {
                IoError::new(ErrorKind::SourceLost, "the server broke the NBD protocol").caused_by(error)
            }
        }
    }
}

fn broke(what: &'static str) -> Failed {
    Failed::Broke(ProtocolError::Malformed { what })
}

/// Agrees with the server on how `export` is used.
pub(super) async fn negotiate(
    connection: Connection,
    export: &str,
    tls: Option<&ClientTls>,
) -> Result<Open, Failed> {
    if export.len() > STRING_BYTES_MAX || export.contains('\0') {
        let why = format!("the name of an export has at most {STRING_BYTES_MAX} bytes and no NUL");
        return Err(Failed::Refused(IoError::new(ErrorKind::InvalidInput, why)));
    }
    let (mut talk, flags) = Talk::begin(connection, tls).await?;
    let agreed = talk.agree(export, flags).await?;
    let Talk { connection, received, .. } = talk;
    Ok(Open { connection, received, agreed })
}

/// Why an option that was needed was refused.
pub(super) fn unanswered(what: &str, refusal: Refusal) -> Failed {
    match refusal.error {
        Some(OptionError::TlsRequired | OptionError::Shutdown) => refusal.of_export(""),
        error => {
            let why = format!("the server does not answer {what} ({error:?}) {}", refusal.message);
            Failed::Refused(IoError::new(ErrorKind::Unsupported, why.trim_end()))
        }
    }
}

pub(super) struct Talk {
    connection: Connection,
    received: BytesMut,
    /// TLS has begun, and the server has said nothing in it yet: it may still look at our certificate.
    unheard: bool,
}

impl Talk {
    /// Meets the server, and has what follows encrypted where that is asked for.
    pub(super) async fn begin(
        connection: Connection,
        tls: Option<&ClientTls>,
    ) -> Result<(Talk, HandshakeFlags), Failed> {
        let mut talk = Talk { connection, received: BytesMut::new(), unheard: false };
        let flags = talk.greet().await?;
        if let Some(tls) = tls {
            talk = talk.start_tls(tls, flags).await?;
        }
        Ok((talk, flags))
    }

    /// The server's flags, as far as they are answered.
    async fn greet(&mut self) -> Result<HandshakeFlags, Failed> {
        let greeting = self.message(Greeting::decode).await?;
        let fixed = greeting.flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
        let no_zeroes = greeting.flags.contains(HandshakeFlags::NO_ZEROES);
        let mut flags = ClientFlags::empty();
        flags.set(ClientFlags::FIXED_NEWSTYLE, fixed);
        flags.set(ClientFlags::NO_ZEROES, no_zeroes);
        let mut out = BytesMut::new();
        flags.encode(&mut out);
        self.send(out).await?;
        Ok(greeting.flags)
    }

    /// STARTTLS, and from here on everything is encrypted.
    async fn start_tls(mut self, tls: &ClientTls, flags: HandshakeFlags) -> Result<Talk, Failed> {
        let refused = |why: &str| {
            let why = format!("TLS is asked for (tls-creds, or an nbds URI), and the server has none: {why}");
            Failed::Refused(IoError::new(ErrorKind::Unsupported, why))
        };
        if !flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return Err(refused("it does not take options"));
        }
        match self.option(&OptionRequest::StartTls).await?.1 {
            Ok(()) => {}
            Err(Refusal { error: Some(OptionError::Shutdown), message }) => {
                return Err(Refusal { error: Some(OptionError::Shutdown), message }.of_export(""));
            }
            Err(Refusal { message, error }) if message.is_empty() => {
                return Err(refused(&format!("it refuses STARTTLS ({error:?})")));
            }
            Err(Refusal { message, .. }) => return Err(refused(&message)),
        }
        let connection = tls.connect(self.connection, self.received).await?;
        Ok(Talk { connection, received: BytesMut::new(), unheard: true })
    }

    async fn agree(&mut self, export: &str, flags: HandshakeFlags) -> Result<Agreed, Failed> {
        let fixed = flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
        let no_zeroes = flags.contains(HandshakeFlags::NO_ZEROES);
        if !fixed {
            let info = self.export_name(export, no_zeroes).await?;
            let facts = Facts { info: Some(info), ..Facts::default() };
            return self.check(facts, Mode::Simple, Chosen::default());
        }
        let mode = self.choose_mode().await?;
        let contexts = match mode {
            Mode::Simple => Chosen::default(),
            Mode::Structured | Mode::Extended => self.choose_contexts(export).await?,
        };
        match self.go(export).await? {
            Some(facts) => self.check(facts, mode, contexts),
            None => {
                let info = self.export_name(export, no_zeroes).await?;
                self.check(Facts { info: Some(info), ..Facts::default() }, mode, contexts)
            }
        }
    }

    pub(super) async fn choose_mode(&mut self) -> Result<Mode, Failed> {
        for (request, mode) in [
            (OptionRequest::ExtendedHeaders, Mode::Extended),
            (OptionRequest::StructuredReply, Mode::Structured),
        ] {
            match self.option(&request).await?.1 {
                Ok(()) => return Ok(mode),
                Err(refusal) => refusal.only_here()?,
            }
        }
        Ok(Mode::Simple)
    }

    async fn choose_contexts(&mut self, export: &str) -> Result<Chosen, Failed> {
        let queries = vec![CONTEXT_ALLOCATION.to_owned(), CONTEXT_BACKGROUND.to_owned()];
        let request = OptionRequest::MetaContext { set: true, export: export.to_owned(), queries };
        let (replies, end) = self.option(&request).await?;
        if let Err(refusal) = end {
            // What is wrong with the export, GO will tell.
            refusal.only_here()?;
            return Ok(Chosen::default());
        }
        let mut chosen = Chosen::default();
        for reply in replies {
            match reply {
                OptionReply::MetaContext { id, name }
                    if name == CONTEXT_ALLOCATION && chosen.allocation.is_none() =>
                {
                    chosen.allocation = Some(id);
                }
                OptionReply::MetaContext { name, .. } if name == CONTEXT_BACKGROUND => {
                    chosen.background = true
                }
                OptionReply::MetaContext { .. } => {
                    return Err(broke("the server chose a context that nobody asked for"));
                }
                _ => {}
            }
        }
        Ok(chosen)
    }

    /// GO; `None` if the server does not know it.
    async fn go(&mut self, export: &str) -> Result<Option<Facts>, Failed> {
        let wanted = vec![INFO_BLOCK_SIZE, INFO_NAME, INFO_DESCRIPTION];
        let request = OptionRequest::Info { go: true, name: export.to_owned(), wanted };
        let (replies, end) = self.option(&request).await?;
        match end {
            Ok(()) => {}
            Err(Refusal { error: Some(OptionError::Unsupported), .. }) => return Ok(None),
            Err(refusal) => return Err(refusal.of_export(export)),
        }
        let mut facts = Facts::default();
        for reply in replies {
            match reply {
                OptionReply::Info(Info::Export(info)) => facts.info = Some(info),
                OptionReply::Info(Info::Name(name)) => facts.name = Some(name),
                OptionReply::Info(Info::Description(text)) => facts.description = Some(text),
                OptionReply::Info(Info::BlockSize { min, preferred, max }) => {
                    facts.blocks = Some((min, preferred, max));
                }
                _ => {}
            }
        }
        Ok(Some(facts))
    }

    /// EXPORT_NAME: a refusal is a disconnect.
    async fn export_name(&mut self, export: &str, no_zeroes: bool) -> Result<ExportInfo, Failed> {
        let mut out = BytesMut::new();
        OptionRequest::ExportName(export.to_owned()).encode(&mut out);
        self.send(out).await?;
        let answer = self.message(|buf| Ok(ExportInfo::decode_bare(no_zeroes, buf))).await;
        answer.map_err(|failed| match failed {
            Failed::Lost(error) => Failed::Refused(
                IoError::new(
                    ErrorKind::NotFound,
                    format!("the server hung up when it was asked for the export {export:?}; is it there?"),
                )
                .caused_by(error),
            ),
            other => other,
        })
    }

    /// Sends an option and collects its replies, up to the last one.
    pub(super) async fn option(
        &mut self,
        request: &OptionRequest,
    ) -> Result<(Vec<OptionReply>, Result<(), Refusal>), Failed> {
        // They are so few that their lengths bound them.
        let mut left = usize::MAX;
        self.option_of(request, REPLIES_MAX, &mut left).await
    }

    /// The same, of an option of a listing: it may have so many replies, and they take of the bytes that are `left` for all.
    pub(super) async fn option_of(
        &mut self,
        request: &OptionRequest,
        most: usize,
        left: &mut usize,
    ) -> Result<(Vec<OptionReply>, Result<(), Refusal>), Failed> {
        let mut out = BytesMut::new();
        request.encode(&mut out);
        self.send(out).await?;
        let mut replies = Vec::new();
        while replies.len() < most {
            let header = self.message(OptionReplyHeader::decode).await?;
            if header.option != request.option() {
                return Err(broke("the server answers an option that was not asked"));
            }
            *left = left.checked_sub(size_of::<OptionReply>() + header.len as usize).ok_or_else(|| {
                let why = format!(
                    "the server tells more than {LISTING_BYTES_MAX} bytes of its exports, which is the most that is listed: \
                     ask for one of them by its name"
                );
                Failed::Refused(IoError::new(ErrorKind::TooLarge, why))
            })?;
            while self.received.len() < header.len as usize {
                self.receive().await?;
            }
            let data = self.received.split_to(header.len as usize);
            match OptionReply::decode(header.kind, &data)? {
                OptionReply::Ack => return Ok((replies, Ok(()))),
                OptionReply::Error { error, message } => {
                    return Ok((replies, Err(Refusal { error: Some(error), message })));
                }
                OptionReply::UnknownError { message, .. } => {
                    return Ok((replies, Err(Refusal { error: None, message })));
                }
                reply => replies.push(reply),
            }
        }
        Err(broke("the server answers an option without end"))
    }

    fn check(&self, facts: Facts, mode: Mode, contexts: Chosen) -> Result<Agreed, Failed> {
        let info = facts.info.ok_or(broke("the server did not tell the export's size"))?;
        if i64::try_from(info.size).is_err() {
            return Err(broke("the export's size is above 2^63 bytes"));
        }
        let (min, preferred, max) = facts.blocks.unwrap_or((1, 4096, MAX_TRANSFER_BYTES as u32));
        if !min.is_power_of_two() || min > MIN_BLOCK_MAX {
            return Err(broke("the smallest request size is not a power of two up to 64 KiB"));
        }
        if max < min {
            return Err(broke("the largest request size is below the smallest"));
        }
        if !info.size.is_multiple_of(u64::from(min)) {
            // Its last bytes could never be read.
            let why =
                format!("the export's size {} is not a multiple of its smallest request, {min}", info.size);
            return Err(Failed::Refused(IoError::new(ErrorKind::InvalidInput, why)));
        }
        // Only a hint: what makes no sense is not followed.
        let preferred = if preferred.is_power_of_two() { preferred.max(min) } else { min.max(4096) };
        let max = max.min(MAX_TRANSFER_BYTES as u32) / min * min;
        Ok(Agreed {
            mode,
            size: info.size,
            flags: info.flags,
            min_block: min,
            preferred_block: preferred,
            max_block: max,
            allocation: contexts.allocation,
            background: contexts.background,
            name: facts.name,
            description: facts.description,
        })
    }

    async fn send(&mut self, out: BytesMut) -> Result<(), Failed> {
        let Err(error) = self.connection.writer.write_all(out.freeze().into()).await else { return Ok(()) };
        // Over TLS, what it has said before it hung up tells why.
        match self.receive().await {
            Err(Failed::Lost(told)) if told.kind() == ErrorKind::NotPermitted => Err(Failed::Lost(told)),
            _ => Err(Failed::Lost(self.hung_up().caused_by(error))),
        }
    }

    /// The next message, as `decode` takes it.
    async fn message<T>(
        &mut self,
        decode: impl Fn(&mut BytesMut) -> Result<Option<T>, ProtocolError>,
    ) -> Result<T, Failed> {
        loop {
            if let Some(message) = decode(&mut self.received)? {
                return Ok(message);
            }
            self.receive().await?;
        }
    }

    fn hung_up(&self) -> IoError {
        let why = match self.unheard {
            true => {
                "the server hung up right behind the TLS handshake: it may want a certificate, or another one"
            }
            false => "the server hung up during the handshake",
        };
        IoError::new(ErrorKind::SourceLost, why)
    }

    async fn receive(&mut self) -> Result<(), Failed> {
        let mut buf = std::mem::take(&mut self.received);
        buf.reserve(RECEIVE_BYTES);
        let before = buf.len();
        self.received = match self.connection.reader.read(buf).await {
            Ok(received) => received,
            // Cut off without a word.
            Err(error) if self.unheard && error.kind() != ErrorKind::NotPermitted => {
                return Err(Failed::Lost(self.hung_up().caused_by(error)));
            }
            Err(error) => return Err(Failed::Lost(error)),
        };
        if self.received.len() == before {
            return Err(Failed::Lost(self.hung_up()));
        }
        self.unheard = false;
        Ok(())
    }
}

#[derive(Default)]
struct Facts {
    info: Option<ExportInfo>,
    blocks: Option<(u32, u32, u32)>,
    name: Option<String>,
    description: Option<String>,
}

/// An option was refused.
pub(super) struct Refusal {
    error: Option<OptionError>,
    message: String,
}

impl Refusal {
    /// Goes on without this option, unless the refusal concerns the whole session.
    pub(super) fn only_here(self) -> Result<(), Failed> {
        match self.error {
            Some(OptionError::TlsRequired | OptionError::Shutdown) => Err(self.of_export("")),
            _ => Ok(()),
        }
    }

    fn of_export(self, export: &str) -> Failed {
        let (kind, why) = match self.error {
            Some(OptionError::TlsRequired) => (
                ErrorKind::Unsupported,
                "the server wants TLS: give credentials (an nbds URI with tls-certificates=DIR, or tls-creds)"
                    .to_owned(),
            ),
            Some(OptionError::Unknown) => {
                (ErrorKind::NotFound, format!("the server has no export named {export:?}"))
            }
            Some(OptionError::Policy) => {
                (ErrorKind::NotPermitted, format!("the server does not give us the export {export:?}"))
            }
            Some(OptionError::Shutdown) => {
                (ErrorKind::ShuttingDown, "the server is shutting down".to_owned())
            }
            error => (ErrorKind::Io, format!("the server refuses the export {export:?} ({error:?})")),
        };
        let why = if self.message.is_empty() { why } else { format!("{why}: {}", self.message) };
        Failed::Refused(IoError::new(kind, why))
    }
}
