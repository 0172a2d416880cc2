//! From a new connection to GO: option haggling.
//!
//! What the client asks is answered in order, one option at a time. Its memory is bounded by the limits on an option's
//! data and on a list; its time by the caller, who gives all of it one deadline.
//!
//! Where TLS is asked for, every option but STARTTLS and ABORT is refused until it has begun, so nothing that was said in
//! the clear is kept. What a client sends behind STARTTLS is TLS, also what came before the answer.

use bytes::{Buf, BytesMut};
use infill_base::{ErrorKind, Gather, IoError, IoResult};
use infill_node::{Bitmap, Through};
use infill_storage::stream::{Connection, StreamRead, StreamWrite};
use infill_storage::sync::Arc;

use super::exports::{Attached, Exports};
use super::limits::{LIST_BYTES_MAX, OPTIONS_PER_EXPORT, ServerLimits};
use crate::proto::{
    CONTEXT_ALLOCATION, CONTEXT_BACKGROUND, CONTEXT_BITMAP_PREFIX, CONTEXT_DEPTH, ClientFlags, ExportInfo,
    Greeting, HandshakeFlags, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_NAME, Info, Mode, OPTION_BYTES_MAX,
    OptionError, OptionHeader, OptionReply, OptionRequest,
};
use crate::tls::ServerTls;

/// Room for what a client sends during the handshake, in bytes.
const RECEIVE_BYTES: usize = 4096;
/// Data of an option that is too long to be taken is thrown away up to this length; a longer one ends the session.
const SKIPPED_OPTION_BYTES_MAX: u32 = 4 << 20;
/// The smallest block size that clients which never asked for block sizes are known to keep to, in bytes.
const BLOCK_BYTES_ASSUMED: u32 = 512;

/// What a client is told that asks for anything before TLS.
const WITHOUT_TLS: &str = "this server wants TLS: begin with STARTTLS";

/// Metadata contexts, by the number that stands for each on the wire.
pub(super) const CONTEXT_NAMES: [(u32, &str); 2] = [(0, CONTEXT_ALLOCATION), (1, CONTEXT_DEPTH)];

/// The number that `infill:background` has on the wire, behind those of all bitmaps. It says nothing in a block status.
const BACKGROUND_ID: u32 = u32::MAX;

/// Which metadata contexts a client has chosen.
#[derive(Clone, Debug, Default)]
pub(super) struct Contexts {
    /// `base:allocation`.
    pub allocation: bool,
    /// `qemu:allocation-depth`.
    pub depth: bool,
    /// `infill:background`: the client says of which requests nobody waits for them.
    pub background: bool,
    /// `qemu:dirty-bitmap:…`, each with its number on the wire.
    pub bitmaps: Vec<(u32, Arc<Bitmap>)>,
}

impl Contexts {
    /// Whether there is none that has a block status.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many have a block status.
    pub(super) fn len(&self) -> usize {
        usize::from(self.allocation) + usize::from(self.depth) + self.bitmaps.len()
    }

    fn chosen(&self) -> impl Iterator<Item = (u32, String)> {
        let wanted = [self.allocation, self.depth];
        let fixed =
            CONTEXT_NAMES.into_iter().zip(wanted).filter_map(|(context, wanted)| wanted.then_some(context));
        let bitmaps = self.bitmaps.iter().map(|(id, bitmap)| (*id, bitmap_context(bitmap)));
        let background = self.background.then(|| (BACKGROUND_ID, CONTEXT_BACKGROUND.to_owned()));
        fixed.map(|(id, name)| (id, name.to_owned())).chain(bitmaps).chain(background)
    }
}

fn bitmap_context(bitmap: &Bitmap) -> String {
    format!("{CONTEXT_BITMAP_PREFIX}{}", bitmap.name())
}

/// What a handshake that ended with GO or EXPORT_NAME has agreed on.
pub(super) struct Agreed {
    pub export: Attached,
    pub info: ExportInfo,
    pub mode: Mode,
    pub contexts: Contexts,
    pub reader: Box<dyn StreamRead>,
    pub writer: Box<dyn StreamWrite>,
    /// What the client has sent after it.
    pub received: BytesMut,
}

/// A connection before GO.
struct Haggle<'a> {
    exports: &'a Exports,
    connection: Connection,
    /// TLS that is asked for and has not begun.
    tls: Option<&'a ServerTls>,
    /// Whether it has begun.
    secure: bool,
    received: BytesMut,
    /// Replies that are not sent yet.
    out: BytesMut,
    no_zeroes: bool,
    mode: Mode,
    /// The last SET_META_CONTEXT: for which export, and what.
    chosen: Option<(String, Contexts)>,
    /// Options that were taken.
    options: u32,
    limits: &'a ServerLimits,
    /// Further ones, for the longest list that was answered.
    options_for_list: u32,
}

/// What comes after an option.
enum Next<'a> {
    Option,
    Tls(&'a ServerTls),
    Transmission(Attached, ExportInfo),
    End,
}

/// Speaks with a new client until it has chosen an export; `None` if it ended the session by the rules.
pub(super) async fn handshake(
    connection: Connection,
    exports: &Exports,
    limits: &ServerLimits,
    tls: Option<&ServerTls>,
) -> IoResult<Option<Agreed>> {
    let mut haggle = Haggle {
        exports,
        connection,
        tls,
        secure: false,
        received: BytesMut::with_capacity(RECEIVE_BYTES),
        out: BytesMut::new(),
        no_zeroes: false,
        mode: Mode::Simple,
        chosen: None,
        options: 0,
        limits,
        options_for_list: 0,
    };
    haggle.greet().await?;
    loop {
        match haggle.option().await? {
            Next::Option => haggle.flush().await?,
            Next::Tls(tls) => {
                haggle.flush().await?;
                let Haggle { connection, received, .. } = haggle;
                let connection = tls.accept(connection, received).await?;
                haggle = Haggle { connection, received: BytesMut::new(), tls: None, secure: true, ..haggle };
            }
            Next::End => {
                // The client may be gone already, which is fine.
                let _ = haggle.flush().await;
                return Ok(None);
            }
            Next::Transmission(export, info) => {
                haggle.flush().await?;
                let contexts = match &haggle.chosen {
                    Some((name, contexts)) if *name == export.export().name => contexts.clone(),
                    _ => Contexts::default(),
                };
                let Haggle { connection: Connection { reader, writer, .. }, received, mode, .. } = haggle;
                return Ok(Some(Agreed { export, info, mode, contexts, reader, writer, received }));
            }
        }
    }
}

impl<'a> Haggle<'a> {
    async fn greet(&mut self) -> IoResult<()> {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        Greeting { flags }.encode(&mut self.out);
        self.flush().await?;
        let flags = loop {
            if let Some(flags) = ClientFlags::decode(&mut self.received)? {
                break flags;
            }
            self.receive().await?;
        };
        self.no_zeroes = flags.contains(ClientFlags::NO_ZEROES);
        Ok(())
    }

    async fn flush(&mut self) -> IoResult<()> {
        let out = self.out.split().freeze();
        self.connection.writer.write_all(Gather::from(out)).await
    }

    /// Receives at least one byte more.
    async fn receive(&mut self) -> IoResult<()> {
        let mut buf = std::mem::take(&mut self.received);
        buf.reserve(RECEIVE_BYTES);
        let before = buf.len();
        self.received = self.connection.reader.read(buf).await?;
        if self.received.len() == before {
            return Err(IoError::new(ErrorKind::Io, "the client closed the connection during the handshake"));
        }
        Ok(())
    }

    /// The data of an option, or `None` if it was too long and was thrown away.
    async fn option_data(&mut self, len: u32) -> IoResult<Option<BytesMut>> {
        if len <= OPTION_BYTES_MAX {
            while self.received.len() < len as usize {
                self.receive().await?;
            }
            return Ok(Some(self.received.split_to(len as usize)));
        }
        if len > SKIPPED_OPTION_BYTES_MAX {
            let why = format!("the client sent an option of {len} bytes");
            return Err(IoError::new(ErrorKind::TooLarge, why));
        }
        let mut left = len as usize;
        while left > 0 {
            let skip = left.min(self.received.len());
            self.received.advance(skip);
            left -= skip;
            if left > 0 {
                self.receive().await?;
            }
        }
        Ok(None)
    }

    /// Takes one option, and puts its replies into `out`.
    async fn option(&mut self) -> IoResult<Next<'a>> {
        let header = loop {
            if let Some(header) = OptionHeader::decode(&mut self.received)? {
                break header;
            }
            self.receive().await?;
        };
        self.options += 1;
        if self.options > self.limits.options_max + self.options_for_list {
            return Err(IoError::new(ErrorKind::TooLarge, "the client sent too many options"));
        }
        let option = header.option;
        let Some(data) = self.option_data(header.len).await? else {
            match self.tls {
                Some(_) => self.refuse(option, OptionError::TlsRequired, WITHOUT_TLS),
                None => self.refuse(option, OptionError::TooBig, "the data of this option is too long"),
            }
            return Ok(Next::Option);
        };
        let export_name = OptionRequest::ExportName(String::new()).option();
        match OptionRequest::decode(option, &data) {
            Ok(request @ (OptionRequest::StartTls | OptionRequest::Abort)) => self.answer(option, request),
            _ if self.tls.is_some() && option == export_name => {
                Err(IoError::new(ErrorKind::NotPermitted, format!("the client is refused: {WITHOUT_TLS}")))
            }
            _ if self.tls.is_some() => {
                self.refuse(option, OptionError::TlsRequired, WITHOUT_TLS);
                Ok(Next::Option)
            }
            Ok(request) => self.answer(option, request),
            Err(error) if option == export_name => Err(error.into()),
            Err(error) => {
                self.refuse(option, OptionError::Invalid, &error.to_string());
                Ok(Next::Option)
            }
        }
    }

    fn reply(&mut self, option: u32, reply: &OptionReply) {
        reply.encode(option, &mut self.out);
    }

    fn refuse(&mut self, option: u32, error: OptionError, message: &str) {
        self.reply(option, &OptionReply::Error { error, message: message.to_owned() });
    }

    fn answer(&mut self, option: u32, request: OptionRequest) -> IoResult<Next<'a>> {
        match request {
            OptionRequest::ExportName(name) => return self.export_name(&name),
            OptionRequest::Abort => {
                self.reply(option, &OptionReply::Ack);
                return Ok(Next::End);
            }
            OptionRequest::List => self.list(option),
            OptionRequest::Info { go, name, wanted } => return Ok(self.info(option, go, &name, &wanted)),
            OptionRequest::StartTls if self.secure => {
                self.refuse(option, OptionError::Invalid, "TLS has begun already");
            }
            OptionRequest::StartTls if let Some(tls) = self.tls => {
                self.reply(option, &OptionReply::Ack);
                return Ok(Next::Tls(tls));
            }
            OptionRequest::StartTls => {
                self.refuse(option, OptionError::Policy, "this server is not configured for TLS");
            }
            OptionRequest::StructuredReply if self.mode == Mode::Extended => {
                let why = "extended headers were agreed on, which include structured replies";
                self.refuse(option, OptionError::ExtendedHeaders, why);
            }
            OptionRequest::StructuredReply => self.raise_mode(option, Mode::Structured),
            OptionRequest::ExtendedHeaders => self.raise_mode(option, Mode::Extended),
            OptionRequest::MetaContext { set, export, queries } => {
                self.meta_context(option, set, export, &queries);
            }
            OptionRequest::Unknown(number) => {
                let why = format!("option {number} is not known");
                self.refuse(option, OptionError::Unsupported, &why);
            }
        }
        Ok(Next::Option)
    }

    fn raise_mode(&mut self, option: u32, mode: Mode) {
        if self.mode >= mode {
            return self.refuse(option, OptionError::Invalid, "this was agreed on already");
        }
        self.mode = mode;
        self.reply(option, &OptionReply::Ack);
    }

    /// There is no error reply: what fails ends the session.
    fn export_name(&mut self, name: &str) -> IoResult<Next<'a>> {
        let refused = |why: &str| IoError::new(ErrorKind::NotFound, format!("the export '{name}' {why}"));
        let export = self.exports.attach(name);
        let export =
            export.ok_or_else(|| refused(self.exports.denied(name).as_deref().unwrap_or("is not known")))?;
        if export.export().node.node_limits().request_align > BLOCK_BYTES_ASSUMED {
            return Err(refused("needs a client that asks for block sizes"));
        }
        let info = export.export().info(self.mode, self.limits);
        info.encode_bare(self.no_zeroes, &mut self.out);
        Ok(Next::Transmission(export, info))
    }

    fn list(&mut self, option: u32) {
        let before = self.out.len();
        let exports = self.exports.list();
        for status in &exports {
            let (name, description) = (status.export.name.clone(), status.export.description.clone());
            self.reply(option, &OptionReply::Server { name, description });
            if self.out.len() - before > LIST_BYTES_MAX {
                let why = "there are more exports than a list may hold; ask for one by its name";
                return self.refuse(option, OptionError::TooBig, why);
            }
        }
        self.reply(option, &OptionReply::Ack);
        // Only the longest list counts: asking again and again earns nothing.
        self.options_for_list = self.options_for_list.max(exports.len() as u32 * OPTIONS_PER_EXPORT);
    }

    fn info(&mut self, option: u32, go: bool, name: &str, wanted: &[u16]) -> Next<'a> {
        let Some(export) = self.exports.attach(name) else {
            self.refuse_export(option, name);
            return Next::Option;
        };
        let info = export.export().info(self.mode, self.limits);
        self.reply(option, &OptionReply::Info(Info::Export(info)));
        if wanted.contains(&INFO_NAME) {
            self.reply(option, &OptionReply::Info(Info::Name(name.to_owned())));
        }
        let description = &export.export().description;
        if wanted.contains(&INFO_DESCRIPTION) && !description.is_empty() {
            self.reply(option, &OptionReply::Info(Info::Description(description.clone())));
        }
        // Told to everybody: who does not understand it ignores it.
        self.reply(option, &OptionReply::Info(export.export().block_sizes()));
        let asked = wanted.contains(&INFO_BLOCK_SIZE);
        if go && !asked && export.export().node.node_limits().request_align > BLOCK_BYTES_ASSUMED {
            let why = "this export has a large minimum block size: ask for block sizes";
            self.refuse(option, OptionError::BlockSizeRequired, why);
            return Next::Option;
        }
        self.reply(option, &OptionReply::Ack);
        if go { Next::Transmission(export, info) } else { Next::Option }
    }

    /// An export that cannot be chosen.
    fn refuse_export(&mut self, option: u32, name: &str) {
        match self.exports.denied(name) {
            Some(why) => self.refuse(option, OptionError::Policy, &why),
            None => self.refuse(option, OptionError::Unknown, &format!("there is no export named '{name}'")),
        }
    }

    fn meta_context(&mut self, option: u32, set: bool, name: String, queries: &[String]) {
        if set {
            // Also a request that fails takes the old choice back.
            self.chosen = None;
        }
        if set && self.mode == Mode::Simple {
            let why = "structured replies must be agreed on before contexts are chosen";
            return self.refuse(option, OptionError::Invalid, why);
        }
        let Some(export) = self.exports.get(&name).filter(|_| self.exports.denied(&name).is_none()) else {
            return self.refuse_export(option, &name);
        };
        let mut contexts = Contexts::default();
        let all = |namespace: &str, query: &str| !set && (query == namespace || queries.is_empty());
        for query in queries.iter().map(String::as_str).chain((!set && queries.is_empty()).then_some("")) {
            contexts.allocation |= query == CONTEXT_ALLOCATION || all("base:", query);
            contexts.depth |= query == CONTEXT_DEPTH || all("qemu:", query);
            // Not in a list of all: others have no use for it.
            contexts.background |= query == CONTEXT_BACKGROUND;
        }
        contexts.depth &= export.allocation_depth;
        for (id, bitmap) in (CONTEXT_NAMES.len() as u32..).zip(&export.bitmaps) {
            let name = bitmap_context(bitmap);
            let wanted = |query: &str| {
                query == name || all("qemu:", query) || (!set && query == CONTEXT_BITMAP_PREFIX)
            };
            if wanted("") || queries.iter().any(|query| wanted(query)) {
                contexts.bitmaps.push((id, bitmap.clone()));
            }
        }
        for (id, context) in contexts.chosen() {
            // In a list the number means nothing.
            let reply = OptionReply::MetaContext { id: if set { id } else { 0 }, name: context };
            self.reply(option, &reply);
        }
        self.reply(option, &OptionReply::Ack);
        if set {
            self.chosen = Some((name, contexts));
        }
    }
}
