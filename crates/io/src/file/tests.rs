use super::*;
use crate::Reactors;
use infill_base::Class;

fn run<F: Future<Output = ()> + 'static>(make: impl FnOnce(PathBuf) -> F + Send + 'static) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    Reactors::start(1).unwrap().block_on(move || make(path));
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) | 1).collect()
}

async fn get(file: &FileStorage, at: u64, len: usize) -> Vec<u8> {
    let buf = aligned_buffer(len, file.limits().memory_align as usize);
    file.read(&Ctx::GUEST, at, buf).await.unwrap().to_vec()
}

async fn put(file: &FileStorage, at: u64, data: Vec<u8>) {
    file.write(&Ctx::GUEST, at, data.into(), WriteFlags::empty()).await.unwrap();
}

#[test]
fn bytes_come_back_at_any_offset_through_the_cache_and_around_it() {
    for direct in [false, true] {
        run(move |path| async move {
            let options = FileOptions { direct, ..FileOptions::create_new(1 << 20) };
            let file = FileStorage::open(&path, options).unwrap();
            let mut model = vec![0_u8; 1 << 20];
            let mut at = 7_usize;
            for round in 0..60_usize {
                let len = (round * 977) % 20_000 + 1;
                at = (at * 131 + round) % (model.len() - len);
                if round % 5 == 4 {
                    file.write_zeroes(&Ctx::GUEST, at as u64, len as u64, ZeroFlags::empty()).await.unwrap();
                    model[at..at + len].fill(0);
                } else {
                    let data = pattern(len, round as u8);
                    model[at..at + len].copy_from_slice(&data);
                    put(&file, at as u64, data).await;
                }
                assert_eq!(get(&file, 3, 100_001).await, model[3..100_004]);
            }
            assert_eq!(get(&file, 0, model.len()).await, model);
            file.sync(&Ctx::GUEST).await.unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), model);
        });
    }
}

#[test]
fn concurrent_unaligned_direct_writes_of_one_block_all_last() {
    run(|path| async move {
        let options = FileOptions { direct: true, ..FileOptions::create_new(64 << 10) };
        let file = FileStorage::open(&path, options).unwrap();
        let writes = (0..512_u64).map(|i| {
            let file = &file;
            async move { put(file, i * 100, vec![(i % 251) as u8 + 1; 100]).await }
        });
        futures_util::future::join_all(writes).await;
        let all = get(&file, 0, 51_200).await;
        for (i, piece) in all.chunks(100).enumerate() {
            assert!(piece.iter().all(|byte| *byte == (i % 251) as u8 + 1), "write {i} was lost");
        }
    });
}

#[test]
fn reads_behind_the_end_are_refused_and_writes_there_grow_the_file() {
    run(|path| async move {
        let file = FileStorage::open(&path, FileOptions::create_new(1000)).unwrap();
        let error = file.read(&Ctx::GUEST, 500, BytesMut::zeroed(501)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        put(&file, 5000, vec![7; 10]).await;
        assert_eq!(Storage::len(&file), 5010);
        file.write_zeroes(&Ctx::GUEST, 4000, 4000, ZeroFlags::MAY_UNMAP).await.unwrap();
        assert_eq!(Storage::len(&file), 8000);
        assert_eq!(get(&file, 4000, 4000).await, vec![0; 4000]);
        let error = file.write(&Ctx::GUEST, u64::MAX - 4, vec![1; 10].into(), WriteFlags::empty()).await;
        assert_eq!(error.unwrap_err().kind(), ErrorKind::TooLarge);
    });
}

#[test]
fn a_file_that_became_shorter_gives_an_error_not_zeroes() {
    run(|path| async move {
        let file = FileStorage::open(&path, FileOptions::create_new(8192)).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        assert_eq!(
            file.read(&Ctx::GUEST, 0, BytesMut::zeroed(8192)).await.unwrap_err().kind(),
            ErrorKind::Io
        );
    });
}

#[test]
fn holes_are_told_from_data() {
    run(|path| async move {
        let file = FileStorage::open(&path, FileOptions::create_new(1 << 20)).unwrap();
        put(&file, 256 << 10, vec![1; 64 << 10]).await;
        let extents = file.extents(&Ctx::GUEST, 0, 1 << 20).await.unwrap();
        let kinds: Vec<_> = extents.iter().map(|e| (e.start, e.len, e.kind)).collect();
        let (zero, data) = (ExtentKind::Zero, ExtentKind::Data);
        assert_eq!(
            kinds,
            [(0, 256 << 10, zero), (256 << 10, 64 << 10, data), (320 << 10, (1 << 20) - (320 << 10), zero)]
        );
        file.discard(&Ctx::GUEST, 256 << 10, 64 << 10).await.unwrap();
        assert_eq!(file.extents(&Ctx::GUEST, 0, 1 << 20).await.unwrap().len(), 1);
    });
}

#[test]
fn two_writers_are_refused_and_readers_keep_a_writer_out() {
    run(|path| async move {
        let writer = FileStorage::open(&path, FileOptions::create_new(4096)).unwrap();
        let refused = FileStorage::open(&path, FileOptions::default()).err().unwrap();
        assert!(
            matches!(&refused, OpenError::Locked { why } if why.contains("Failed to get \"write\" lock")),
            "{refused}"
        );
        let refused = FileStorage::open(&path, FileOptions::read_only()).err().unwrap();
        assert!(refused.to_string().contains("Failed to get shared \"write\" lock"), "{refused}");
        let unguarded = FileOptions { share: Share::Unguarded, ..FileOptions::read_only() };
        assert!(FileStorage::open(&path, unguarded).is_ok());
        drop(writer);
        let reader = FileStorage::open(&path, FileOptions::read_only()).unwrap();
        let second = FileStorage::open(&path, FileOptions::read_only()).unwrap();
        assert!(FileStorage::open(&path, FileOptions::default()).is_err());
        drop((reader, second));
        assert!(FileStorage::open(&path, FileOptions::default()).is_ok());
    });
}

#[test]
fn a_read_only_file_takes_no_write() {
    run(|path| async move {
        std::fs::write(&path, [1; 512]).unwrap();
        let file = FileStorage::open(&path, FileOptions::read_only()).unwrap();
        let error = file.write(&Ctx::GUEST, 0, vec![1].into(), WriteFlags::empty()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotPermitted);
    });
}

#[test]
fn what_is_no_file_is_refused() {
    let error = FileStorage::open("/dev/null", FileOptions::read_only()).err().unwrap();
    assert!(error.to_string().contains("file or block device"), "{error}");
    assert!(FileStorage::open("/nonexistent/disk", FileOptions::read_only()).is_err());
}

#[test]
fn locks_that_are_taken_late_keep_others_off_until_they_are_given_back() {
    run(|path| async move {
        drop(FileStorage::open(&path, FileOptions::create_new(4096)).unwrap());
        let unguarded = FileOptions { share: Share::Unguarded, ..FileOptions::default() };
        let late = FileStorage::open(&path, unguarded).unwrap();
        late.lock(true).unwrap();
        drop(FileStorage::open(&path, FileOptions::read_only()).unwrap());
        assert!(FileStorage::open(&path, FileOptions::default()).is_err());
        late.lock(false).unwrap();
        assert!(FileStorage::open(&path, FileOptions::read_only()).is_err());
        late.unlock().unwrap();
        let writer = FileStorage::open(&path, FileOptions::default()).unwrap();
        assert!(late.lock(true).is_err());
        drop(writer);
    });
}

#[test]
fn a_fifo_is_refused_at_once_and_a_file_waits_for_its_disk() {
    run(|path| async move {
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let error = FileStorage::open(&path, FileOptions::read_only()).err().unwrap();
        assert!(error.to_string().contains("file or block device"), "{error}");
        std::fs::remove_file(&path).unwrap();
        let file = FileStorage::open(&path, FileOptions::create_new(4096)).unwrap();
        assert!(!rustix::fs::fcntl_getfl(&*file.fd).unwrap().contains(OFlags::NONBLOCK));
    });
}

#[test]
fn large_pieces_of_jobs_go_around_the_cache_and_everybody_reads_them() {
    run(|path| async move {
        let file = FileStorage::open(&path, FileOptions::create_new(1 << 20)).unwrap();
        let can = rustix::fs::open(&path, OFlags::RDWR | OFlags::DIRECT, Mode::empty()).is_ok();
        let mut model = vec![0_u8; 1 << 20];
        for round in 0..40_usize {
            let (at, len, class) = match round % 4 {
                // Behind the end, over what is cached, beside what is dirty.
                0 => (round * 40_960, 65_536, Class::Fill),
                1 => (round * 32_768 % 900_000 / 4096 * 4096, 131_072, Class::Fill),
                2 => (round * 7919 % 900_000, 5001, Class::Guest),
                _ => (round * 6151 % 700_000 + 1, 70_000, Class::Fill),
            };
            let data = pattern(len, round as u8);
            model.resize(model.len().max(at + len), 0);
            model[at..at + len].copy_from_slice(&data);
            let cx = Ctx::of(class);
            // Two runs, of which none is where direct I/O wants it.
            let mut gather = Gather::new();
            let cut = data.len() / 3;
            gather.push(data[..cut].to_vec().into());
            gather.push(data[cut..].to_vec().into());
            file.write(&cx, at as u64, gather, WriteFlags::empty()).await.unwrap();
            file.write_back(&cx, at as u64, len as u64).await.unwrap();
            assert_eq!(file.len(), model.len() as u64);
            assert_eq!(get(&file, 0, model.len()).await, model, "round {round}");
        }
        assert_eq!(file.bulk.is_open(), can);
        file.sync(&Ctx::GUEST).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), model);
    });
}

#[test]
fn the_locks_of_an_image_outlive_the_descriptor_for_large_pieces() {
    run(|path| async move {
        let file = FileStorage::open(&path, FileOptions::create_new(1 << 20)).unwrap();
        let data = Bytes::from(pattern(1 << 17, 1));
        file.write(&Ctx::FILL, 0, data.into(), WriteFlags::empty()).await.unwrap();
        assert!(FileStorage::open(&path, FileOptions::default()).is_err());
        drop(file);
        FileStorage::open(&path, FileOptions::default()).unwrap();
    });
}
