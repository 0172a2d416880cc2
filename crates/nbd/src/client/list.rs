//! What a server exports, asked without using any of it.

use std::time::Duration;

use infill_base::{ErrorKind, IoError, IoResult};
use infill_storage::rt;
use infill_storage::stream::Connector;

use super::negotiate::{Failed, REPLIES_MAX, Talk, unanswered};
use crate::proto::{
    ExportInfo, HandshakeFlags, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_NAME, Info, Mode, OptionReply,
    OptionRequest,
};
use crate::tls::ClientTls;

/// Exports of one server that are listed at most, and metadata contexts of one export.
const EXPORTS_MAX: usize = 4096;
const CONTEXTS_MAX: usize = 1024;
/// Bytes of all replies of a listing, and of the memory that they take beside.
pub(super) const LISTING_BYTES_MAX: usize = 16 << 20;

/// An export, as its server tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// By which clients choose it.
    pub name: String,
    /// For people; empty where there is none.
    pub description: String,
    /// Size and flags, where the server tells them.
    pub info: Option<ExportInfo>,
    /// Smallest, preferred and largest size of requests, in bytes, where the server tells them.
    pub blocks: Option<(u32, u32, u32)>,
    /// How the server and we would speak.
    pub mode: Mode,
    /// Metadata contexts that it offers.
    pub contexts: Vec<String>,
}

/// Asks a server what it exports. `within` is the time for all of it.
pub async fn list_exports(
    connector: &dyn Connector,
    tls: Option<&ClientTls>,
    within: Duration,
) -> IoResult<Vec<ListedExport>> {
    let listing = async {
        let connection = connector.connect().await.map_err(Failed::Lost)?;
        let (mut talk, flags) = Talk::begin(connection, tls).await?;
        if !flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            let why = "the server takes no options, and so it lists nothing";
            return Err(Failed::Refused(IoError::new(ErrorKind::Unsupported, why)));
        }
        talk.list().await
    };
    let why = || IoError::new(ErrorKind::TimedOut, format!("the server took longer than {within:?}"));
    rt::timeout(within, listing).await.ok_or_else(why)?.map_err(IoError::from)
}

impl Talk {
    async fn list(&mut self) -> Result<Vec<ListedExport>, Failed> {
        let mode = self.choose_mode().await?;
        let mut left = LISTING_BYTES_MAX;
        let (replies, end) = self.option_of(&OptionRequest::List, EXPORTS_MAX, &mut left).await?;
        end.map_err(|refusal| unanswered("LIST", refusal))?;
        let mut exports = Vec::new();
        for reply in replies {
            let OptionReply::Server { name, description } = reply else { continue };
            exports.push(self.look_at(name, description, mode, &mut left).await?);
        }
        // Who goes without a word looks like one that was lost.
        let _ = self.option_of(&OptionRequest::Abort, 1, &mut left).await;
        Ok(exports)
    }

    async fn look_at(
        &mut self,
        name: String,
        description: String,
        mode: Mode,
        left: &mut usize,
    ) -> Result<ListedExport, Failed> {
        let mut listed =
            ListedExport { name, description, info: None, blocks: None, mode, contexts: Vec::new() };
        let wanted = vec![INFO_BLOCK_SIZE, INFO_NAME, INFO_DESCRIPTION];
        let request = OptionRequest::Info { go: false, name: listed.name.clone(), wanted };
        let (replies, end) = self.option_of(&request, REPLIES_MAX, left).await?;
        if let Err(refusal) = end {
            // It may be gone, or not for us: its name is all that is known.
            refusal.only_here()?;
            return Ok(listed);
        }
        for reply in replies {
            match reply {
                OptionReply::Info(Info::Export(info)) => listed.info = Some(info),
                OptionReply::Info(Info::Description(text)) => listed.description = text,
                OptionReply::Info(Info::BlockSize { min, preferred, max }) => {
                    listed.blocks = Some((min, preferred, max));
                }
                _ => {}
            }
        }
        if mode == Mode::Simple {
            return Ok(listed);
        }
        let request =
            OptionRequest::MetaContext { set: false, export: listed.name.clone(), queries: Vec::new() };
        let (replies, end) = self.option_of(&request, CONTEXTS_MAX, left).await?;
        if let Err(refusal) = end {
            refusal.only_here()?;
        }
        let name = |reply| match reply {
            OptionReply::MetaContext { name, .. } => Some(name),
            _ => None,
        };
        listed.contexts = replies.into_iter().filter_map(name).collect();
        Ok(listed)
    }
}
