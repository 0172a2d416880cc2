//! A copy whose process dies at any moment goes on in the next one where it was, with no write lost, in a world of virtual
//! time.

mod world;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, Extents, Gather, IoResult, Limits, WriteFlags, ZeroFlags};
use infill_job::copy::backup::{self, BackupOptions, BackupSync};
use infill_job::copy::commit::{self, CommitOptions};
use infill_job::copy::mirror::{self, CopyMode, MirrorOptions, MirrorSync};
use infill_job::copy::{GivenMap, KeptCopy, KeptMap, Looked, MapGuard, MapOwner, has_what_it_should};
use infill_job::{Job, JobOptions, JobStatus, Jobs};
use infill_node::{BackingSlot, MemoryOverlay, Node, NodeHandle, NodeInfo, Populated};
use infill_sim::{JournalPages, Rng, World};
use infill_storage::journal::{BootId, JournalMemory as _, journal_bytes};
use infill_storage::rt;
use world::{KIB, MIB};

const LEN: u64 = 2 * MIB;
const BLOCK: u64 = 4 * KIB;
const MS: Duration = Duration::from_millis(1);
/// Cluster of a target that is to lie on the base of the source later.
const CLUSTER: u64 = 64 * KIB;
/// What the base holds.
const BASE: u8 = 254;
/// Stands for a byte that such a target does not have.
const ABSENT: u8 = 255;

/// A disk in memory of which every request takes a while, before and after it lands.
struct Slow {
    inner: MemoryOverlay,
    rng: std::sync::Mutex<Rng>,
    written: AtomicU64,
    /// What a sync has covered: what it holds for sure when its server dies.
    stable: std::sync::Mutex<Vec<u8>>,
    /// How long a sync takes, and a little.
    sync_takes: std::sync::Mutex<Duration>,
}

struct Shared(Arc<Slow>);

impl Slow {
    fn new(world: &World, backing: Option<NodeHandle>, content: Option<&[u8]>) -> Arc<Slow> {
        Slow::over(world, MemoryOverlay::new(LEN, BLOCK, backing), content)
    }

    /// A layer that has those blocks of `content` which its base does not hold.
    fn on_base(world: &World, content: &[u8]) -> Arc<Slow> {
        let base = MemoryOverlay::new(LEN, BLOCK, None);
        let written = base.write(&Ctx::GUEST, 0, vec![BASE; LEN as usize].into(), WriteFlags::empty());
        infill_sim::block_on(written).unwrap();
        let inner = MemoryOverlay::new(LEN, BLOCK, Some(NodeHandle::new(base)));
        for (nth, block) in content.chunks(BLOCK as usize).enumerate().filter(|(_, block)| block[0] != BASE) {
            let data = block.to_vec().into();
            let written = inner.write(&Ctx::GUEST, nth as u64 * BLOCK, data, WriteFlags::empty());
            infill_sim::block_on(written).unwrap();
        }
        Slow::over(world, inner, None)
    }

    fn over(world: &World, inner: MemoryOverlay, content: Option<&[u8]>) -> Arc<Slow> {
        if let Some(content) = content {
            let written = inner.write(&Ctx::GUEST, 0, content.to_vec().into(), WriteFlags::empty());
            infill_sim::block_on(written).unwrap();
        }
        let rng = std::sync::Mutex::new(world.fork_rng());
        let (written, stable, sync_takes) = Default::default();
        let slow = Slow { inner, rng, written, stable, sync_takes };
        *slow.stable.lock().unwrap() = now(&slow);
        Arc::new(slow)
    }

    async fn wait(&self) {
        let micros = self.rng.lock().unwrap().below(300);
        rt::sleep(Duration::from_micros(micros)).await;
    }
}

impl Node for Shared {
    fn limits(&self) -> Limits {
        Node::limits(&self.0.inner)
    }
    fn len(&self) -> u64 {
        Node::len(&self.0.inner)
    }
    fn info(&self) -> NodeInfo {
        self.0.inner.info()
    }
    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.0.wait().await;
        let read = Node::read(&self.0.inner, cx, at, buf).await;
        self.0.wait().await;
        read
    }
    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.0.wait().await;
        self.0.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        Node::write(&self.0.inner, cx, at, data, flags).await?;
        self.0.wait().await;
        Ok(())
    }
    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.0.wait().await;
        Node::write_zeroes(&self.0.inner, cx, at, len, flags).await?;
        self.0.wait().await;
        Ok(())
    }
    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        Node::discard(&self.0.inner, cx, at, len).await
    }
    async fn sync(&self, _: &Ctx) -> IoResult<()> {
        let covered = now(&self.0);
        let takes = *self.0.sync_takes.lock().unwrap();
        rt::sleep(takes).await;
        self.0.wait().await;
        *self.0.stable.lock().unwrap() = covered;
        Ok(())
    }
    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        Node::extents(&self.0.inner, cx, at, len).await
    }
    fn backing(&self) -> Option<&BackingSlot> {
        Node::backing(&self.0.inner)
    }
    fn populate_unit(&self) -> u64 {
        Node::populate_unit(&self.0.inner)
    }
    async fn populate(&self, cx: &Ctx, at: u64, data: Bytes, generation: u64) -> IoResult<Populated> {
        Node::populate(&self.0.inner, cx, at, data, generation).await
    }
    async fn make_empty(&self, cx: &Ctx) -> IoResult<()> {
        Node::make_empty(&self.0.inner, cx).await
    }
}

/// Records that memory has room for, in which blocks are small, and large.
const SMALL_BLOCKS: u64 = 0;
const LARGE_BLOCKS: u64 = 1000;

/// The owner of a map in that memory.
fn owner(pages: &JournalPages) -> MapOwner {
    let is_large = size_of_val(pages.words()) >= journal_bytes(LARGE_BLOCKS);
    let granularity = if is_large { 4 * BLOCK } else { BLOCK };
    MapOwner { generation: 1, boot: BootId(1), identity: "job".into(), len: LEN, granularity }
}

fn since_owner() -> MapOwner {
    MapOwner { identity: "since".into(), ..owner(&JournalPages::new(SMALL_BLOCKS)) }
}

/// What a death leaves.
struct Left {
    source: Vec<u8>,
    target: Vec<u8>,
    pages: JournalPages,
    since: JournalPages,
    given: JournalPages,
    /// Where source and target are looked at before a copy goes on, what was wrong.
    wrong: Option<Arc<std::sync::Mutex<Option<String>>>>,
    allowed: Vec<Vec<u8>>,
    /// What guests have written in all their lives.
    stamp: u8,
}

fn now(disk: &Slow) -> Vec<u8> {
    let read = Node::read(&disk.inner, &Ctx::GUEST, 0, BytesMut::zeroed(LEN as usize));
    // In one step: nobody else has a turn.
    infill_sim::block_on(read).unwrap().to_vec()
}

/// A disk with the same content, that takes no time.
fn still(disk: &Slow) -> NodeHandle {
    let inner = MemoryOverlay::new(LEN, BLOCK, None);
    infill_sim::block_on(inner.write(&Ctx::GUEST, 0, now(disk).into(), WriteFlags::empty())).unwrap();
    NodeHandle::new(inner)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mirror(CopyMode),
    Commit,
    /// To a target on a server that dies with the process, and with any of what no sync has covered.
    MirrorToServer(CopyMode),
    CommitToServer,
    Backup,
    /// From a disk on such a server.
    MirrorFromServer(CopyMode),
    CommitFromServer,
    /// From and to such servers: which of them dies with the process.
    BackupOfServers {
        source: bool,
        target: bool,
    },
    /// Of the top layer alone, to a target of large clusters that is to lie on the base later.
    MirrorTop(CopyMode),
    BackupTop,
}

impl Kind {
    fn is_of_the_past(self) -> bool {
        matches!(self, Kind::Backup | Kind::BackupTop | Kind::BackupOfServers { .. })
    }

    fn is_to_server(self) -> bool {
        matches!(self, Kind::MirrorToServer(_) | Kind::CommitToServer | Kind::BackupOfServers { .. })
    }

    fn is_from_server(self) -> bool {
        matches!(self, Kind::MirrorFromServer(_) | Kind::CommitFromServer | Kind::BackupOfServers { .. })
    }

    /// Whether source and target forget what they have not synced when the process dies.
    fn forget(self) -> [bool; 2] {
        match self {
            Kind::BackupOfServers { source, target } => [source, target],
            _ => [self.is_from_server(), self.is_to_server()],
        }
    }

    /// Bytes per second: servers are synced once a second, several times in a copy.
    fn speed(self) -> u64 {
        let on_servers = self.is_to_server() || self.is_from_server();
        if on_servers { MIB / 2 } else { 8 * MIB }
    }
}

struct Life {
    node: NodeHandle,
    source: Arc<Slow>,
    target: Arc<Slow>,
    job: Job,
    stop: Rc<Cell<bool>>,
    alive: Rc<Cell<usize>>,
    /// What each block may hold: what was answered last, and what is under way.
    allowed: Rc<RefCell<Vec<Vec<u8>>>>,
    stamp: Rc<Cell<u8>>,
}

fn start(world: &World, kind: Kind, left: &Left, found: Option<KeptMap>, guests: usize) -> Life {
    let is_top = matches!(kind, Kind::MirrorTop(_) | Kind::BackupTop);
    let cluster = if is_top { CLUSTER } else { BLOCK };
    let target = Slow::over(world, MemoryOverlay::new(LEN, cluster, None), Some(&left.target));
    let below = NodeHandle::new(Shared(target.clone()));
    let (source, node) = match kind {
        Kind::Mirror(_)
        | Kind::MirrorToServer(_)
        | Kind::MirrorFromServer(_)
        | Kind::Backup
        | Kind::BackupOfServers { .. } => {
            let source = Slow::new(world, None, Some(&left.source));
            (source.clone(), NodeHandle::new(Shared(source)))
        }
        Kind::MirrorTop(_) | Kind::BackupTop => {
            let source = Slow::on_base(world, &left.source);
            (source.clone(), NodeHandle::new(Shared(source)))
        }
        Kind::Commit | Kind::CommitToServer | Kind::CommitFromServer => {
            let source = Slow::new(world, Some(below.clone()), Some(&left.source));
            (source.clone(), NodeHandle::new(Shared(source)))
        }
    };
    if found.is_none() && kind.is_from_server() {
        // Nothing of it is stable before a sync.
        source.stable.lock().unwrap().fill(ABSENT);
    }
    let has_given = matches!(kind, Kind::BackupOfServers { .. });
    let kept = match found.map(Arc::new) {
        Some(found) => {
            // Guests are there before the job is.
            let since =
                has_given.then(|| KeptMap::find(Arc::new(left.since.clone()), since_owner()).unwrap());
            let since = since.map(Arc::new);
            let guard = MapGuard::new(found.clone(), kind.is_of_the_past()).with_since(since.clone());
            let given = has_given.then(|| GivenMap::find(Arc::new(left.given.clone()), &found).unwrap());
            let guarded = KeptCopy::guarded(found, infill_sim::block_on(node.watch(Arc::new(guard))));
            guarded.with_since(since).with_given(given.map(Arc::new))
        }
        None => {
            let begun =
                KeptMap::begin(Arc::new(left.pages.clone()), owner(&left.pages), kind.is_of_the_past());
            let begun = begun.unwrap();
            let since = has_given
                .then(|| KeptMap::begin(Arc::new(left.since.clone()), since_owner(), false).unwrap());
            let given = has_given.then(|| GivenMap::begin(Arc::new(left.given.clone()), &begun).unwrap());
            KeptCopy::new(Arc::new(begun)).with_since(since.map(Arc::new)).with_given(given.map(Arc::new))
        }
    };
    let kept = kept.until_synced(kind.is_to_server()).from_server(kind.is_from_server());
    if let Some(wrong) = &left.wrong
        && kept.map().is_found()
    {
        let checked = infill_sim::block_on(async {
            // The disks take no time to be looked at.
            let nodes = [&source, &target].map(|disk| still(disk));
            let looked = Looked {
                map: kept.map(),
                since: kept.since().map(|since| &**since),
                given: kept.given().map(|given| &**given),
                is_of_the_past: kind.is_of_the_past(),
                from_server: kept.is_from_server(),
            };
            has_what_it_should(looked, &nodes[0], &nodes[1]).await
        });
        *wrong.lock().unwrap() = checked.err().map(|why| why.to_string());
    }
    let kept = Some(kept);
    let (jobs, options) = (Jobs::new(), JobOptions { speed: kind.speed(), ..JobOptions::new("copy") });
    let job = match kind {
        Kind::Mirror(copy_mode)
        | Kind::MirrorToServer(copy_mode)
        | Kind::MirrorFromServer(copy_mode)
        | Kind::MirrorTop(copy_mode) => {
            let sync = if is_top { MirrorSync::Top } else { MirrorSync::Full };
            let mirror = MirrorOptions { kept, copy_mode, sync, ..MirrorOptions::new(node.clone(), below) };
            mirror::start(&jobs, options, mirror).unwrap()
        }
        Kind::Commit | Kind::CommitToServer | Kind::CommitFromServer => {
            let commit = CommitOptions { kept, ..CommitOptions::new(node.clone(), below) };
            commit::start(&jobs, options, commit).unwrap()
        }
        Kind::Backup | Kind::BackupTop | Kind::BackupOfServers { .. } => {
            let held = infill_sim::block_on(node.hold_changes());
            let sync = if is_top { BackupSync::Top } else { BackupSync::Full };
            let backup = BackupOptions { kept, sync, ..BackupOptions::new(node.clone(), below) };
            let prepared = backup::prepare(&jobs, options, backup, &held).unwrap();
            prepared.start(&jobs).unwrap()
        }
    };
    let life = Life {
        node: node.clone(),
        source,
        target,
        job,
        stop: Rc::default(),
        alive: Rc::new(Cell::new(guests)),
        allowed: Rc::new(RefCell::new(left.allowed.clone())),
        stamp: Rc::new(Cell::new(left.stamp)),
    };
    for own in 0..guests as u64 {
        let (allowed, stop, alive) = (life.allowed.clone(), life.stop.clone(), life.alive.clone());
        let (stamp, node, mut rng) = (life.stamp.clone(), node.clone(), world.fork_rng());
        rt::spawn(async move {
            while !stop.get() {
                // Some blocks are written again and again.
                let most = [LEN / BLOCK / 4, 8][rng.below(2) as usize];
                let block = rng.below(most) * 4 + own;
                stamp.set(stamp.get() % 250 + 1);
                let value = stamp.get();
                allowed.borrow_mut()[block as usize].push(value);
                let data = vec![value; BLOCK as usize];
                node.write(&Ctx::GUEST, block * BLOCK, data, WriteFlags::empty()).await.unwrap();
                // Answered: it is this one now.
                allowed.borrow_mut()[block as usize] = vec![value];
                rt::sleep(Duration::from_micros(rng.below(2000))).await;
            }
            alive.set(alive.get() - 1);
        });
    }
    life
}

fn empty(world: &World, records: u64) -> Left {
    let mut rng = world.fork_rng();
    let source: Vec<u8> =
        (0..LEN / BLOCK).flat_map(|_| vec![rng.below(250) as u8 + 1; BLOCK as usize]).collect();
    let allowed = source.chunks(BLOCK as usize).map(|block| vec![block[0]]).collect();
    let (pages, since) = (JournalPages::new(records), JournalPages::new(SMALL_BLOCKS));
    let given = JournalPages::new(GivenMap::BYTES as u64 / 32);
    Left { source, target: vec![0; LEN as usize], pages, since, given, wrong: None, allowed, stamp: 0 }
}

/// A layer that has every sixth block, on its base, and a target that has nothing.
fn empty_on_base(world: &World, records: u64) -> Left {
    let mut left = empty(world, records);
    for (nth, block) in left.source.chunks_mut(BLOCK as usize).enumerate().filter(|(nth, _)| nth % 6 != 1) {
        block.fill(BASE);
        left.allowed[nth] = vec![BASE];
    }
    left.target.fill(ABSENT);
    left
}

/// The target once it lies on the base. A cluster that it has a part of hides the rest.
fn on_base(target: &[u8]) -> Vec<u8> {
    let mut seen = target.to_vec();
    for cluster in seen.chunks_mut(CLUSTER as usize).filter(|cluster| cluster.iter().all(|at| *at == ABSENT))
    {
        cluster.fill(BASE);
    }
    seen
}

/// The process dies after a while: what is left.
fn die(seed: u64, kind: Kind, left: &Left, found: Option<KeptMap>, lives: Duration) -> Left {
    let world = World::new(seed);
    world.run(async {
        // One guest leaves most of the disk as it is.
        let on_servers = kind.is_to_server() || kind.is_from_server();
        let life = start(&world, kind, left, found, if on_servers { 1 } else { 4 });
        rt::sleep(lives).await;
        let [mut source, mut target] = [now(&life.source), now(&life.target)];
        let mut allowed = life.allowed.borrow().clone();
        let mut rng = world.fork_rng();
        let disks = [(&mut source, &life.source), (&mut target, &life.target)];
        for (forgets, (content, disk)) in kind.forget().into_iter().zip(disks).filter(|(forgets, _)| *forgets)
        {
            assert!(forgets);
            let stable = disk.stable.lock().unwrap();
            let blocks = content.chunks_mut(BLOCK as usize).zip(stable.chunks(BLOCK as usize));
            for (block, stable) in blocks.filter(|_| rng.below(2) == 0) {
                block.copy_from_slice(stable);
            }
        }
        if kind.forget()[0] {
            // Whatever the guest was told: it has not synced.
            allowed = source.chunks(BLOCK as usize).map(|block| vec![block[0]]).collect();
        }
        let (pages, since, given) = (left.pages.copy(), left.since.copy(), left.given.copy());
        life.stop.set(true);
        let wrong = left.wrong.clone();
        Left { source, target, pages, since, given, wrong, allowed, stamp: life.stamp.get() }
    })
}

fn find(left: &Left) -> Result<KeptMap, String> {
    KeptMap::find(Arc::new(left.pages.clone()), owner(&left.pages))
}

/// Lets a job that has died go on to its end without guests. How much it has written.
fn finish(seed: u64, kind: Kind, left: &Left, found: Option<KeptMap>) -> u64 {
    let world = World::new(seed);
    world.run(async {
        let life = start(&world, kind, left, found, 0);
        life.job.set_speed(0).unwrap();
        while life.job.status() != JobStatus::Ready {
            rt::sleep(MS).await;
        }
        life.job.block_cancel(false).unwrap();
        life.job.wait().await.unwrap();
        let target = on_base(&now(&life.target));
        for (nth, block) in target.chunks(BLOCK as usize).enumerate() {
            assert!(
                left.allowed[nth].iter().any(|value| block == vec![*value; BLOCK as usize]),
                "seed {seed}, {kind:?}: block {nth} holds {} and may hold {:?}",
                block[0],
                left.allowed[nth]
            );
            assert!(block == &left.source[nth * BLOCK as usize..][..BLOCK as usize], "block {nth}");
        }
        assert!(find(left).is_err(), "seed {seed}: a job that has ended leaves no map");
        life.target.written.load(Ordering::Relaxed)
    })
}

fn begin(world: &World, kind: Kind, records: u64) -> Left {
    match kind {
        Kind::MirrorTop(_) | Kind::BackupTop => empty_on_base(world, records),
        _ => empty(world, records),
    }
}

fn dies_and_goes_on(kind: Kind) {
    let mut spared = 0;
    for seed in 0..60 {
        let mut rng = Rng::new(seed + 1);
        let records = [SMALL_BLOCKS, LARGE_BLOCKS][seed as usize % 2];
        let mut left = begin(&World::new(seed), kind, records);
        let mut found = None;
        for _ in 0..1 + rng.below(4) {
            let lives = Duration::from_micros(rng.below(8 * MIB / kind.speed() * 400_000));
            left = die(seed, kind, &left, found, lives);
            found = find(&left).ok();
        }
        let differs = left.source.chunks(BLOCK as usize).zip(left.target.chunks(BLOCK as usize));
        let differs = differs.filter(|(one, other)| one != other).count() as u64 * BLOCK;
        let went_on = found.is_some();
        let written = finish(seed, kind, &left, found);
        // What was in flight when it died may be there and not be known to be.
        let on_servers = kind.is_to_server() || kind.is_from_server();
        let is_small = records == SMALL_BLOCKS && !matches!(kind, Kind::MirrorTop(_)) && !on_servers;
        let bound = if is_small { differs + MIB / 2 } else { LEN * 2 };
        assert!(!went_on || written <= bound, "seed {seed}, {kind:?}: {written} bytes, {differs} differed");
        spared += u64::from(went_on && written < LEN * 3 / 4);
    }
    assert!(
        spared >= 10 || kind.forget() == [false, false],
        "{kind:?}: {spared} of them went on in the middle"
    );
}

#[test]
fn a_mirror_goes_on_after_a_death_at_any_moment() {
    dies_and_goes_on(Kind::Mirror(CopyMode::Background));
}

#[test]
fn a_write_blocking_mirror_goes_on_after_a_death_at_any_moment() {
    dies_and_goes_on(Kind::Mirror(CopyMode::WriteBlocking));
}

#[test]
fn a_commit_goes_on_after_a_death_at_any_moment() {
    dies_and_goes_on(Kind::Commit);
}

#[test]
fn a_copy_to_a_server_that_dies_with_what_it_has_not_synced_goes_on_and_lacks_nothing() {
    dies_and_goes_on(Kind::MirrorToServer(CopyMode::Background));
    dies_and_goes_on(Kind::MirrorToServer(CopyMode::WriteBlocking));
    dies_and_goes_on(Kind::CommitToServer);
}

#[test]
fn a_copy_from_a_server_that_dies_with_what_it_has_not_synced_goes_on_and_is_the_same() {
    dies_and_goes_on(Kind::MirrorFromServer(CopyMode::Background));
    dies_and_goes_on(Kind::MirrorFromServer(CopyMode::WriteBlocking));
    dies_and_goes_on(Kind::CommitFromServer);
}

#[test]
fn guests_that_are_held_at_the_end_of_a_copy_do_not_wait_for_a_sync_of_the_source() {
    let world = World::new(9);
    let left = empty(&world, SMALL_BLOCKS);
    world.run(async {
        let life = start(&world, Kind::MirrorFromServer(CopyMode::Background), &left, None, 0);
        life.job.set_speed(0).unwrap();
        while life.job.status() != JobStatus::Ready {
            rt::sleep(MS).await;
        }
        let write = |at: u64| life.node.write(&Ctx::GUEST, at, vec![1; 512], WriteFlags::empty());
        // The next sync is due at once, and the one after it when the target is synced at the end.
        rt::sleep(3000 * MS).await;
        write(0).await.unwrap();
        rt::sleep(100 * MS).await;
        write(BLOCK).await.unwrap();
        *life.target.sync_takes.lock().unwrap() = 2000 * MS;
        *life.source.sync_takes.lock().unwrap() = 1_000_000 * MS;
        life.job.block_cancel(false).unwrap();
        rt::timeout(100_000 * MS, life.job.wait()).await.expect("nobody waits for the source").unwrap();
    });
}

/// Of 60 backups, how many went on in the middle, and how many were given up because a server has forgotten something.
fn backups_of_servers(source: bool, target: bool) -> (u64, u64) {
    let kind = Kind::BackupOfServers { source, target };
    let (mut went_on, mut given_up) = (0, 0);
    'seeds: for seed in 0..60 {
        let mut rng = Rng::new(seed + 1);
        let begin = empty(&World::new(seed), [SMALL_BLOCKS, LARGE_BLOCKS][seed as usize % 2]);
        let as_it_was = begin.source.clone();
        let lives = |rng: &mut Rng| Duration::from_micros(rng.below(2_000_000));
        let mut left = die(seed, kind, &begin, None, lives(&mut rng));
        let wrong = Arc::new(std::sync::Mutex::new(None));
        left.wrong = Some(wrong.clone());
        let is_wrong = || wrong.lock().unwrap().is_some();
        for _ in 0..rng.below(3) {
            // Before the source has synced what the disk was there is none.
            let Ok(found) = find(&left) else { continue 'seeds };
            left = die(seed, kind, &left, Some(found), lives(&mut rng));
            if is_wrong() {
                given_up += 1;
                continue 'seeds;
            }
        }
        let Ok(found) = find(&left) else { continue };
        let is_whole = found.copied() >= LEN;
        let world = World::new(seed);
        world.run(async {
            let life = start(&world, kind, &left, Some(found), 1);
            if is_wrong() {
                given_up += 1;
                life.stop.set(true);
                return;
            }
            went_on += u64::from(!is_whole);
            life.job.set_speed(0).unwrap();
            life.job.wait().await.unwrap();
            life.stop.set(true);
            let target = now(&life.target);
            let wrong = target.iter().zip(&as_it_was).position(|(one, other)| one != other);
            assert_eq!(
                wrong.map(|at| at as u64 / BLOCK),
                None,
                "seed {seed}, {kind:?}: a block is not as it was"
            );
        });
    }
    (went_on, given_up)
}

#[test]
fn a_backup_of_servers_goes_on_after_a_death_and_is_given_up_where_one_has_forgotten() {
    let outcomes = [[false, false], [true, false], [false, true], [true, true]]
        .map(|[source, target]| backups_of_servers(source, target));
    println!("{outcomes:?} went on, and were given up");
    let [none, source, target, both] = outcomes;
    // What a source forgets is what guests have written, which is on the target as it was.
    assert!(none.0 > 20 && none.1 == 0 && source.0 > 20, "{outcomes:?}");
    assert!(target.1 > 20 && both.1 > 20 && target.0 + both.0 > 0, "{outcomes:?}");
}

#[test]
fn a_backup_goes_on_after_a_death_at_any_moment_and_is_the_disk_as_it_was() {
    let mut went_on = 0;
    for seed in 0..60 {
        let mut rng = Rng::new(seed + 1);
        let records = [SMALL_BLOCKS, LARGE_BLOCKS][seed as usize % 2];
        let begin = empty(&World::new(seed), records);
        let as_it_was = begin.source.clone();
        let mut left = die(seed, Kind::Backup, &begin, None, Duration::from_micros(rng.below(200_000)));
        for _ in 0..rng.below(4) {
            let Ok(found) = find(&left) else { break };
            left = die(seed, Kind::Backup, &left, Some(found), Duration::from_micros(rng.below(200_000)));
        }
        // One that has ended in its last life leaves a map that says that nothing is left.
        let found = find(&left).expect("it was kept from the first moment on");
        went_on += u64::from(found.copied() < LEN);
        let world = World::new(seed);
        let differ = as_it_was.chunks(BLOCK as usize).zip(left.target.chunks(BLOCK as usize));
        let differ = differ.filter(|(one, other)| one != other).count() as u64 * BLOCK;
        world.run(async {
            let life = start(&world, Kind::Backup, &left, Some(found), 4);
            life.job.set_speed(0).unwrap();
            life.job.wait().await.unwrap();
            life.stop.set(true);
            let target = now(&life.target);
            let wrong = target.iter().zip(&as_it_was).position(|(one, other)| one != other);
            assert_eq!(wrong.map(|at| at as u64 / BLOCK), None, "seed {seed}: a block that is not as it was");
            let written = life.target.written.load(Ordering::Relaxed);
            let bound = if records == SMALL_BLOCKS { differ + MIB / 2 } else { LEN };
            assert!(written <= bound, "seed {seed}: {written} bytes, {differ} differed");
            assert_ne!(now(&life.source), as_it_was, "guests have written");
        });
    }
    assert!(went_on > 20, "{went_on} went on in the middle");
}

#[test]
fn a_mirror_of_the_top_layer_has_whole_clusters_after_a_death_at_any_moment() {
    dies_and_goes_on(Kind::MirrorTop(CopyMode::Background));
    dies_and_goes_on(Kind::MirrorTop(CopyMode::WriteBlocking));
}

#[test]
fn a_backup_of_the_top_layer_has_whole_clusters_after_a_death_at_any_moment() {
    for seed in 0..60 {
        let mut rng = Rng::new(seed + 1);
        let records = [SMALL_BLOCKS, LARGE_BLOCKS][seed as usize % 2];
        let begin = empty_on_base(&World::new(seed), records);
        let as_it_was = begin.source.clone();
        let mut left = die(seed, Kind::BackupTop, &begin, None, Duration::from_micros(rng.below(200_000)));
        for _ in 0..rng.below(4) {
            let found = find(&left).ok();
            left = die(seed, Kind::BackupTop, &left, found, Duration::from_micros(rng.below(200_000)));
        }
        let found = find(&left).expect("it was kept from the first moment on");
        let world = World::new(seed);
        world.run(async {
            let life = start(&world, Kind::BackupTop, &left, Some(found), 4);
            life.job.set_speed(0).unwrap();
            life.job.wait().await.unwrap();
            life.stop.set(true);
            let target = on_base(&now(&life.target));
            let wrong = target.iter().zip(&as_it_was).position(|(one, other)| one != other);
            assert_eq!(wrong.map(|at| at as u64 / BLOCK), None, "seed {seed}: a block that is not as it was");
        });
    }
}

#[test]
fn without_its_map_everything_is_copied_again() {
    let left =
        die(1, Kind::Mirror(CopyMode::Background), &empty(&World::new(1), SMALL_BLOCKS), None, 100 * MS);
    find(&left).unwrap();
    let pages = JournalPages::new(SMALL_BLOCKS);
    let without = Left { pages, ..left };
    assert!(find(&without).is_err());
    assert!(finish(1, Kind::Mirror(CopyMode::Background), &without, None) >= LEN);
}

#[test]
fn what_is_written_before_the_job_begins_again_is_seen() {
    let world = World::new(7);
    world.run(async {
        let source = NodeHandle::new(Shared(Slow::new(&world, None, None)));
        // Of the past, what is overwritten makes it void.
        for (past, live) in [(false, true), (true, false)] {
            let pages = JournalPages::new(SMALL_BLOCKS);
            let begun = KeptMap::begin(Arc::new(pages.clone()), owner(&pages), false).unwrap();
            begun.mark(3 * BLOCK, 1);
            begun.go_live();
            let map = Arc::new(KeptMap::find(Arc::new(pages.clone()), owner(&pages)).unwrap());
            let watching = source.watch(Arc::new(MapGuard::new(map.clone(), past))).await;
            source.write(&Ctx::GUEST, 5 * BLOCK, vec![1; 512], WriteFlags::empty()).await.unwrap();
            assert_eq!((map.has_marked(5 * BLOCK, 1), map.is_live()), (!past, true));
            source.write(&Ctx::GUEST, 3 * BLOCK + 512, vec![1; 512], WriteFlags::empty()).await.unwrap();
            assert_eq!((map.has_marked(3 * BLOCK, 1), map.is_live()), (true, live));
            // Dropped before it was used: somebody who takes the guard back has it see what is written.
            let back = Rc::new(RefCell::new(None));
            let slot = back.clone();
            let kept = KeptCopy::guarded(map.clone(), watching);
            drop(kept.given_back_to(move |guard| *slot.borrow_mut() = Some(guard)));
            source.write(&Ctx::GUEST, 7 * BLOCK, vec![1; 512], WriteFlags::empty()).await.unwrap();
            assert_eq!((map.has_marked(7 * BLOCK, 1), map.is_live()), (!past, live));
            // Where nobody does, nobody sees what is written now.
            drop(KeptCopy::guarded(map, back.take().expect("the guard")));
            assert!(KeptMap::find(Arc::new(pages.clone()), owner(&pages)).is_err());
        }
    });
}
