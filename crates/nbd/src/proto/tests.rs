//! Round trips of every message, and bytes that are none.

use bytes::{Bytes, BytesMut};
use infill_base::ErrorKind;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        "[a-z:/ é€]{1,40}",
        (1..STRING_BYTES_MAX + 1).prop_map(|len| "n".repeat(len)),
    ]
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Simple), Just(Mode::Structured), Just(Mode::Extended)]
}

fn option_request() -> impl Strategy<Value = OptionRequest> {
    prop_oneof![
        name().prop_map(OptionRequest::ExportName),
        Just(OptionRequest::Abort),
        Just(OptionRequest::List),
        Just(OptionRequest::StartTls),
        Just(OptionRequest::StructuredReply),
        Just(OptionRequest::ExtendedHeaders),
        (any::<bool>(), name(), vec(any::<u16>(), 0..5)).prop_map(|(go, name, wanted)| OptionRequest::Info {
            go,
            name,
            wanted
        }),
        (any::<bool>(), name(), vec(name(), 0..5))
            .prop_map(|(set, export, queries)| OptionRequest::MetaContext { set, export, queries }),
        (100..u32::MAX).prop_map(OptionRequest::Unknown),
    ]
}

fn flags() -> impl Strategy<Value = TransmissionFlags> {
    any::<u16>().prop_map(TransmissionFlags::from_bits_retain)
}

fn option_reply() -> impl Strategy<Value = OptionReply> {
    let info = prop_oneof![
        (any::<u64>(), flags()).prop_map(|(size, flags)| Info::Export(ExportInfo { size, flags })),
        name().prop_map(Info::Name),
        name().prop_map(Info::Description),
        any::<[u32; 3]>().prop_map(|[min, preferred, max]| Info::BlockSize { min, preferred, max }),
        (4..u16::MAX).prop_map(Info::Unknown),
    ];
    let error = prop_oneof![
        Just(OptionError::Unsupported),
        Just(OptionError::Invalid),
        Just(OptionError::Unknown),
        Just(OptionError::ExtendedHeaders),
    ];
    prop_oneof![
        Just(OptionReply::Ack),
        (name(), name()).prop_map(|(name, description)| OptionReply::Server { name, description }),
        info.prop_map(OptionReply::Info),
        (any::<u32>(), name()).prop_map(|(id, name)| OptionReply::MetaContext { id, name }),
        (error, name()).prop_map(|(error, message)| OptionReply::Error { error, message }),
        (1_u32 << 31 | 100.., name()).prop_map(|(kind, message)| OptionReply::UnknownError { kind, message }),
        (5..1_u32 << 31).prop_map(OptionReply::Unknown),
    ]
}

fn request(mode: Mode) -> impl Strategy<Value = RequestHeader> {
    let command = prop_oneof![
        Just(Command::Read),
        Just(Command::Write),
        Just(Command::Disconnect),
        Just(Command::Flush),
        Just(Command::Trim),
        Just(Command::Cache),
        Just(Command::WriteZeroes),
        Just(Command::BlockStatus),
        (8..u16::MAX).prop_map(Command::Unknown),
    ];
    let len = if mode == Mode::Extended { u64::MAX } else { u32::MAX.into() };
    (any::<u16>(), command, any::<u64>(), any::<u64>(), 0..=len).prop_map(
        |(flags, command, cookie, offset, len)| RequestHeader {
            flags: CommandFlags::from_bits_retain(flags),
            command,
            cookie,
            offset,
            len,
        },
    )
}

fn chunk(mode: Mode) -> impl Strategy<Value = Chunk> {
    let most = if mode == Mode::Extended { u64::MAX } else { u32::MAX.into() };
    let extent = (1..=most, 0..=most).prop_map(|(len, flags)| StatusExtent { len, flags });
    prop_oneof![
        Just(Chunk::None),
        (any::<u64>(), vec(any::<u8>(), 1..50))
            .prop_map(|(offset, data)| Chunk::Data { offset, data: data.into() }),
        (any::<u64>(), 1..u32::MAX).prop_map(|(offset, len)| Chunk::Hole { offset, len }),
        (any::<u32>(), vec(extent, 1..20)).prop_map(|(context, extents)| Chunk::Status { context, extents }),
        (1..u32::MAX, name(), any::<Option<u64>>()).prop_map(|(error, message, offset)| Chunk::Error {
            error,
            message,
            offset
        }),
        (7..1_u16 << 15).prop_map(Chunk::Unknown),
    ]
}

/// Every proper prefix of a message is "not whole yet", and the whole of it is taken exactly.
fn decodes_only_when_whole<T: PartialEq + std::fmt::Debug>(
    wire: &[u8],
    expected: &T,
    decode: impl Fn(&mut BytesMut) -> Result<Option<T>, ProtocolError>,
) {
    for len in 0..wire.len() {
        let mut part = BytesMut::from(&wire[..len]);
        assert_eq!(decode(&mut part).unwrap(), None);
        assert_eq!(part.len(), len, "a message that is not whole was touched");
    }
    let mut whole = BytesMut::from(wire);
    whole.extend_from_slice(b"next");
    assert_eq!(decode(&mut whole).unwrap().as_ref(), Some(expected));
    assert_eq!(&whole[..], b"next");
}

proptest! {
    #[test]
    fn an_option_comes_back_as_it_was(request in option_request()) {
        let mut wire = BytesMut::new();
        request.encode(&mut wire);
        let header = OptionHeader { option: request.option(), len: wire.len() as u32 - 16 };
        decodes_only_when_whole(&wire[..16], &header, OptionHeader::decode);
        prop_assert_eq!(OptionRequest::decode(header.option, &wire[16..]), Ok(request));
    }

    #[test]
    fn a_reply_to_an_option_comes_back_as_it_was(reply in option_reply(), option: u32) {
        let mut wire = BytesMut::new();
        reply.encode(option, &mut wire);
        let header = OptionReplyHeader::decode(&mut wire).unwrap().unwrap();
        prop_assert_eq!((header.option, header.len as usize), (option, wire.len()));
        prop_assert_eq!(OptionReply::decode(header.kind, &wire), Ok(reply));
    }

    #[test]
    fn a_request_comes_back_as_it_was((mode, request) in mode().prop_flat_map(|m| (Just(m), request(m)))) {
        let mut wire = BytesMut::new();
        request.encode(mode, &mut wire);
        prop_assert_eq!(wire.len(), RequestHeader::wire_len(mode));
        decodes_only_when_whole(&wire, &request, |buf| RequestHeader::decode(mode, buf));
    }

    #[test]
    fn a_chunk_comes_back_as_it_was(
        (mode, chunk) in prop_oneof![Just(Mode::Structured), Just(Mode::Extended)]
            .prop_flat_map(|m| (Just(m), chunk(m))),
        cookie: u64,
        offset: u64,
        done: bool,
    ) {
        let mut payload = BytesMut::new();
        let kind = chunk.encode(mode, &mut payload);
        if let Chunk::Data { data, .. } = &chunk {
            payload.extend_from_slice(data);
        }
        let header = ReplyHeader::Chunk {
            flags: if done { ReplyFlags::DONE } else { ReplyFlags::empty() },
            kind,
            cookie,
            offset: if mode == Mode::Extended { offset } else { 0 },
            len: payload.len() as u64,
        };
        let mut wire = BytesMut::new();
        header.encode(mode, &mut wire);
        decodes_only_when_whole(&wire, &header, |buf| ReplyHeader::decode(mode, buf));
        prop_assert_eq!(Chunk::decode(kind, payload.freeze()), Ok(chunk));
    }

    #[test]
    fn a_simple_reply_and_the_bare_export_come_back(error: u32, cookie: u64, size: u64, flags in flags()) {
        let mut wire = BytesMut::new();
        let reply = ReplyHeader::Simple { error, cookie };
        reply.encode(Mode::Simple, &mut wire);
        decodes_only_when_whole(&wire, &reply, |buf| ReplyHeader::decode(Mode::Simple, buf));
        for no_zeroes in [false, true] {
            let mut wire = BytesMut::new();
            let info = ExportInfo { size, flags };
            info.encode_bare(no_zeroes, &mut wire);
            decodes_only_when_whole(&wire, &info, |buf| Ok(ExportInfo::decode_bare(no_zeroes, buf)));
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic_a_decoder(data in vec(any::<u8>(), 0..200), number: u32, mode in mode()) {
        let bytes = || BytesMut::from(&data[..]);
        let _ = Greeting::decode(&mut bytes());
        let _ = ClientFlags::decode(&mut bytes());
        let _ = OptionHeader::decode(&mut bytes());
        let _ = OptionReplyHeader::decode(&mut bytes());
        let _ = RequestHeader::decode(mode, &mut bytes());
        let _ = ReplyHeader::decode(mode, &mut bytes());
        for option in (0..13).chain([number]) {
            let _ = OptionRequest::decode(option, &data);
            let _ = OptionReply::decode(option, &data);
            let _ = OptionReply::decode(1 << 31 | option, &data);
        }
        for number in (0..8).chain([1 << 15, 1 << 15 | 1, 1 << 15 | 2, number as u16]) {
            let payload = Bytes::copy_from_slice(&data);
            let mut header = BytesMut::new();
            let unknown = ReplyHeader::Chunk {
                flags: ReplyFlags::DONE, kind: ChunkKind::Unknown(number), cookie: 0, offset: 0, len: 0,
            };
            unknown.encode(Mode::Structured, &mut header);
            let header = ReplyHeader::decode(Mode::Structured, &mut header).unwrap().unwrap();
            if let ReplyHeader::Chunk { kind, .. } = header {
                let _ = Chunk::decode(kind, payload);
            }
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    // A name longer than the option; a count of informations that is not there; more queries than data.
    let name_too_long = [0, 0, 0, 9, b'a', 0, 0];
    let wanted_missing = [0, 0, 0, 1, b'a', 0, 2, 0, 1];
    let queries_missing = [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
    assert!(OptionRequest::decode(7, &name_too_long).is_err());
    assert!(OptionRequest::decode(6, &wanted_missing).is_err());
    assert!(OptionRequest::decode(10, &queries_missing).is_err());
    assert!(OptionRequest::decode(3, b"x").is_err(), "LIST takes no data");
    assert_eq!(OptionRequest::decode(2, b"x"), Ok(OptionRequest::Abort), "data of ABORT is ignored");
    let long = vec![b'a'; STRING_BYTES_MAX + 1];
    assert!(matches!(OptionRequest::decode(1, &long), Err(ProtocolError::TooLong { .. })));
    assert!(OptionRequest::decode(1, b"a\0b").is_err(), "a NUL in a name");
    assert!(OptionRequest::decode(1, b"\xff").is_err(), "a name that is not UTF-8");
}

#[test]
fn a_chunk_that_states_too_much_is_refused_before_it_is_waited_for() {
    let mut wire = BytesMut::new();
    let header = ReplyHeader::Chunk {
        flags: ReplyFlags::DONE,
        kind: ChunkKind::Data,
        cookie: 1,
        offset: 0,
        len: REPLY_BYTES_MAX + 1,
    };
    header.encode(Mode::Extended, &mut wire);
    assert!(matches!(ReplyHeader::decode(Mode::Extended, &mut wire), Err(ProtocolError::TooLong { .. })));
    let no_extents = Bytes::from_static(&[0, 0, 0, 0]);
    assert!(Chunk::decode(ChunkKind::Status, no_extents).is_err());
    let count_is_wrong =
        Bytes::from(vec![0, 0, 0, 0, 0, 0, 0, 2].into_iter().chain([1; 16]).collect::<Vec<_>>());
    assert!(Chunk::decode(ChunkKind::StatusExtended, count_is_wrong).is_err());
}

#[test]
fn a_header_of_another_mode_is_refused() {
    let request =
        RequestHeader { flags: CommandFlags::empty(), command: Command::Flush, cookie: 1, offset: 0, len: 0 };
    let (mut compact, mut extended) = (BytesMut::new(), BytesMut::new());
    request.encode(Mode::Structured, &mut compact);
    request.encode(Mode::Extended, &mut extended);
    assert!(RequestHeader::decode(Mode::Extended, &mut compact).is_err());
    assert!(RequestHeader::decode(Mode::Simple, &mut extended).is_err());
    let mut simple = BytesMut::new();
    ReplyHeader::Simple { error: 0, cookie: 1 }.encode(Mode::Simple, &mut simple);
    assert!(ReplyHeader::decode(Mode::Extended, &mut simple).is_err());
}

#[test]
fn an_oldstyle_server_is_named() {
    let mut wire = BytesMut::from(&b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"[..]);
    let error = Greeting::decode(&mut wire).unwrap_err();
    assert!(error.to_string().contains("oldstyle"), "{error}");
}

#[test]
fn texts_that_are_too_long_are_cut_between_characters() {
    let mut wire = BytesMut::new();
    let message = "€".repeat(STRING_BYTES_MAX);
    OptionReply::Error { error: OptionError::Invalid, message }.encode(3, &mut wire);
    let header = OptionReplyHeader::decode(&mut wire).unwrap().unwrap();
    let OptionReply::Error { message, .. } = OptionReply::decode(header.kind, &wire).unwrap() else {
        panic!("not an error")
    };
    assert_eq!(message.len(), STRING_BYTES_MAX / 3 * 3);
}

#[test]
fn kinds_that_the_protocol_knows_come_back_from_their_numbers() {
    for kind in [
        ErrorKind::NotPermitted,
        ErrorKind::Io,
        ErrorKind::InvalidInput,
        ErrorKind::NoSpace,
        ErrorKind::TooLarge,
        ErrorKind::Unsupported,
        ErrorKind::ShuttingDown,
    ] {
        assert_eq!(kind_of(errno_of(kind)), kind);
    }
    assert_eq!(kind_of(errno_of(ErrorKind::Corrupt)), ErrorKind::Io);
    assert_eq!(kind_of(4711), ErrorKind::InvalidInput);
}
