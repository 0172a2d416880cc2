//! What goes over a control connection: lines, each one [`Frame`]: the checksum (CRC-32) of what follows, in eight hexadecimal
//! digits, a space, and JSON. TCP's own checksum lets one damaged segment in 65,536 pass, and one digit decides which blocks
//! are stale.
//!
//! Strict, as records are: what is unknown, missing or beyond a limit ends the connection, never the daemon. A peer can make
//! the receiver hold one line of [`FRAME_BYTES_MAX`] and the sets in it, of [`SETS_BLOCKS_MAX`] blocks together.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::MigrationId;
use crate::message::{Message, Standing};
use crate::record::BLOCKS_MAX;

/// The version of the frames.
pub const WIRE_VERSION: u32 = 2;
/// Longest line, in bytes.
pub const FRAME_BYTES_MAX: usize = 64 << 20;
/// Blocks of all sets of one message together: a bit each.
pub const SETS_BLOCKS_MAX: u64 = BLOCKS_MAX;

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Frame {
    /// The first one, of both sides.
    Hello {
        /// Of the frames.
        version: u32,
        /// Where the sender's exports are, as a URI without an export's name; of a source.
        data: Option<String>,
    },
    /// From one machine to the other.
    Message(Message),
    /// Where does your machine stand?
    Ask(MigrationId),
    /// The answer, where there is one.
    Standing {
        /// Of which migration.
        migration: MigrationId,
        /// Where it stands.
        standing: Standing,
    },
    /// A target does not begin a migration.
    Refused {
        /// Which one.
        migration: MigrationId,
        /// Why, and what to do.
        why: String,
    },
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireError(String);

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the peer's message is not understood: {}", self.0)
    }
}

impl std::error::Error for WireError {}

impl Frame {
    /// Its line, with the end.
    pub fn encode(&self) -> Vec<u8> {
        let json = serde_json::to_vec(self).unwrap_or_default();
        let mut line = format!("{:08x} ", checksum(&json)).into_bytes();
        line.extend_from_slice(&json);
        line.push(b'\n');
        line
    }

    /// The frame of a line, with or without its end.
    pub fn decode(line: &[u8]) -> Result<Frame, WireError> {
        if line.len() > FRAME_BYTES_MAX {
            return Err(WireError(format!("expected at most {FRAME_BYTES_MAX} bytes, found {}", line.len())));
        }
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let none = || WireError("expected a checksum of eight digits, a space and JSON".into());
        let (sum, json) = line.split_at_checked(SUM_BYTES).ok_or_else(none)?;
        let said = std::str::from_utf8(sum).ok().and_then(|sum| sum.strip_suffix(' '));
        let said = said.and_then(|sum| u32::from_str_radix(sum, 16).ok()).ok_or_else(none)?;
        let found = checksum(json);
        if said != found {
            return Err(WireError(format!(
                "it was damaged on its way: its checksum is {found:08x}, and it says {said:08x}"
            )));
        }
        Frame::parse(json)
    }

    /// The frame of a line's JSON.
    fn parse(json: &[u8]) -> Result<Frame, WireError> {
        serde_json::from_slice(json).map_err(|error| WireError(error.to_string()))
    }
}

/// Of the checksum and the space behind it.
const SUM_BYTES: usize = 9;

/// CRC-32 as of Ethernet, a byte at a time.
fn checksum(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut at = 0;
        while at < table.len() {
            let (mut rest, mut bit) = (at as u32, 0);
            while bit < 8 {
                rest = if rest & 1 == 1 { rest >> 1 ^ 0xedb8_8320 } else { rest >> 1 };
                bit += 1;
            }
            table[at] = rest;
            at += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |sum, byte| sum >> 8 ^ TABLE[((sum ^ u32::from(*byte)) & 0xff) as usize])
}

/// Sets of blocks on the wire: how many blocks, and the lengths of runs, out and in by turns.
pub(crate) mod sets {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::SETS_BLOCKS_MAX;
    use crate::record::DISKS_MAX;
    use crate::set::BlockSet;

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct WireSet {
        blocks: u64,
        runs: Vec<u64>,
    }

    pub(crate) fn serialize<S: Serializer>(sets: &[BlockSet], to: S) -> Result<S::Ok, S::Error> {
        let wire = sets.iter().map(|set| {
            let (mut runs, mut next) = (Vec::new(), 0);
            for run in set.runs() {
                runs.extend([run.start - next, run.end - run.start]);
                next = run.end;
            }
            WireSet { blocks: set.blocks(), runs }
        });
        wire.collect::<Vec<_>>().serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<BlockSet>, D::Error> {
        let wire = Vec::<WireSet>::deserialize(from)?;
        let total = wire.iter().try_fold(0u64, |total, set| total.checked_add(set.blocks));
        if wire.len() > DISKS_MAX || total.is_none_or(|total| total > SETS_BLOCKS_MAX) {
            return Err(D::Error::custom("sets of too many disks or blocks"));
        }
        wire.into_iter()
            .map(|wire| {
                let (mut set, mut next) = (BlockSet::empty(wire.blocks), 0u64);
                for (index, run) in wire.runs.into_iter().enumerate() {
                    let end = next.checked_add(run).filter(|end| *end <= wire.blocks);
                    let end = end.ok_or_else(|| D::Error::custom("a run beyond the end of its set"))?;
                    if index % 2 == 1 {
                        set.insert_range(next..end);
                    }
                    next = end;
                }
                Ok(set)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::ids::{BitmapId, DiskId, Epoch, Round, Term};
    use crate::message::Body;
    use crate::record::{Disk, SourceState, State};
    use crate::set::BlockSet;

    fn message(body: Body) -> Frame {
        Frame::Message(Message { migration: MigrationId(Uuid::from_u128(7)), term: Term(3), body })
    }

    #[test]
    fn every_kind_of_frame_comes_back_as_it_was() {
        let mut set = BlockSet::empty(100);
        set.insert_range(0..3);
        set.insert(99);
        let (bitmap, round) = (BitmapId(9), Round(2));
        let disk = Disk { id: DiskId(Uuid::from_u128(1)), bytes: 6 << 20, epoch_before: Epoch(41) };
        let bodies = [
            Body::Prepare { disks: vec![disk.clone()], block_bytes: 65536, whole: false, way_back: 300 },
            Body::Prepare { disks: vec![disk], block_bytes: 65536, whole: true, way_back: 0 },
            Body::Prepared,
            Body::Round { bitmap, round, dirty: vec![set.clone(), BlockSet::empty(0)] },
            Body::Applied { bitmap, round },
            Body::RoundRead { bitmap, round },
            Body::Offer { bitmap: None, residual: vec![set] },
            Body::Accepted,
            Body::Confirm,
            Body::Claim { ended: true, forced_from: Some(Term(1)) },
            Body::AskBack,
            Body::BackRefused,
            Body::BackOffer,
            Body::BackAccepted,
            Body::BackConfirm,
            Body::Complete,
            Body::Released,
            Body::Aborted,
        ];
        let migration = MigrationId(Uuid::from_u128(7));
        let state = State::Source(SourceState::HandedOver);
        let standing = Standing { state, term: Term(1), forced_from: None };
        let others = [
            Frame::Hello { version: WIRE_VERSION, data: Some("nbd://a.example:10809".into()) },
            Frame::Ask(migration),
            Frame::Standing { migration, standing },
            Frame::Refused { migration, why: "no room".into() },
        ];
        for frame in bodies.map(message).into_iter().chain(others) {
            let line = frame.encode();
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            assert_eq!(Frame::decode(&line).unwrap(), frame);
        }
    }

    #[test]
    fn what_is_unknown_or_too_large_is_refused() {
        let sets = |sets: &str| {
            let from = format!(
                r#"{{"message":{{"migration":"{}","term":1,"body":{{"offer":{{"bitmap":null,"residual":{sets}}}}}}}}}"#,
                Uuid::from_u128(7)
            );
            Frame::parse(from.as_bytes())
        };
        assert!(sets(r#"[{"blocks":4,"runs":[1,3]}]"#).is_ok());
        for wrong in [
            r#"[{"blocks":4,"runs":[1,4]}]"#,
            r#"[{"blocks":4,"runs":[18446744073709551615,2]}]"#,
            r#"[{"blocks":268435457,"runs":[]}]"#,
            r#"[{"blocks":268435456,"runs":[]},{"blocks":1,"runs":[]}]"#,
            r#"[{"blocks":4,"runs":[],"more":1}]"#,
        ] {
            assert!(sets(wrong).is_err(), "{wrong}");
        }
        let many = format!("[{}]", vec![r#"{"blocks":0,"runs":[]}"#; 65].join(","));
        assert!(sets(&many).is_err());
        for wrong in ["", "{}", "null", r#"{"hello":{"version":1}}x"#, r#"{"ask":"7"}"#, r#"{"other":1}"#] {
            assert!(Frame::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_line_that_was_damaged_is_refused_whichever_bit_it_is() {
        assert_eq!(checksum(b"123456789"), 0xcbf4_3926);
        let line = Frame::Ask(MigrationId(Uuid::from_u128(7))).encode();
        let end = line.len() - 1;
        for bit in 0..8 * end {
            let mut damaged = line.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // A sum in capitals is the same sum.
            let same = damaged[..9].eq_ignore_ascii_case(&line[..9]) && damaged[9..] == line[9..];
            assert!(same || Frame::decode(&damaged).is_err(), "bit {bit}");
        }
        for wrong in ["", "\n", "0", "00000000", "00000000 ", "+0000000 {}", "ééééé"] {
            assert!(Frame::decode(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn lines_from_anywhere_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in 0usize..300) {
            let _ = (Frame::decode(&bytes), Frame::parse(&bytes));
            let mut set = BlockSet::empty(64);
            set.insert(5);
            let mut line = message(Body::Offer { bitmap: Some(BitmapId(1)), residual: vec![set] }).encode();
            let at = at % line.len();
            line.splice(at..at, bytes.into_iter().take(3));
            let _ = (Frame::decode(&line), Frame::parse(&line[SUM_BYTES..]));
        }
    }
}
