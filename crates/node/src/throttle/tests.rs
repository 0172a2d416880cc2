use std::cell::Cell;
use std::rc::Rc;

use infill_base::ThrottleKind;
use infill_sim::World;

use super::*;
use crate::MemoryOverlay;

const LEN: u64 = 1 << 20;

fn group(kind: ThrottleKind, average: u64) -> Arc<ThrottleGroup> {
    let mut limits = ThrottleLimits::default();
    limits.rate_mut(kind).average = average;
    Arc::new(ThrottleGroup::new(limits))
}

fn member(group: &Arc<ThrottleGroup>) -> NodeHandle {
    let disk = NodeHandle::new(MemoryOverlay::new(LEN, 4096, None));
    NodeHandle::new(ThrottleNode::new(disk, group.clone()))
}

/// Writes `count` blocks at once; how many have been written so far.
fn write(node: &NodeHandle, count: usize) -> Rc<Cell<usize>> {
    let done = Rc::new(Cell::new(0));
    for at in 0..count as u64 {
        let (node, done) = (node.clone(), done.clone());
        rt::spawn(async move {
            node.write(&Ctx::GUEST, at * 4096, vec![1; 4096], WriteFlags::empty()).await.unwrap();
            done.set(done.get() + 1);
        });
    }
    done
}

async fn wait(secs: u64) {
    rt::sleep(Duration::from_secs(secs)).await;
}

#[test]
fn the_members_of_a_group_share_its_limit_evenly_and_a_sync_waits_for_nothing() {
    World::new(1).run(async {
        let group = group(ThrottleKind::IopsTotal, 10);
        let (one, other) = (member(&group), member(&group));
        let (first, second) = (write(&one, 100), write(&other, 100));
        wait(10).await;
        let (first, second) = (first.get(), second.get());
        assert!((100..=103).contains(&(first + second)) && first.abs_diff(second) <= 2, "{first} {second}");
        let begin = rt::now();
        one.sync(&Ctx::GUEST).await.unwrap();
        assert_eq!(rt::now(), begin);
    });
}

#[test]
fn who_holds_the_node_waits_for_no_limit_and_what_comes_later_waits_again() {
    World::new(1).run(async {
        let group = group(ThrottleKind::IopsWrite, 1);
        let node = member(&group);
        let done = write(&node, 50);
        wait(1).await;
        assert!(done.get() < 5);
        let begin = rt::now();
        let held = node.hold_changes().await;
        assert_eq!((done.get(), rt::now()), (50, begin));
        drop(held);
        let later = write(&node, 1);
        wait(5).await;
        assert_eq!(later.get(), 0);
        wait(60).await;
        assert_eq!(later.get(), 1);
    });
}

#[test]
fn closing_lets_everything_go_on() {
    World::new(1).run(async {
        let node = member(&group(ThrottleKind::BpsTotal, 1));
        let done = write(&node, 50);
        wait(1).await;
        assert_eq!(done.get(), 1);
        node.close(&Ctx::GUEST).await.unwrap();
        wait(0).await;
        assert_eq!(done.get(), 50);
    });
}

#[test]
fn requests_that_were_given_up_keep_nobody_waiting() {
    World::new(1).run(async {
        let group = group(ThrottleKind::IopsRead, 1);
        let (one, other) = (member(&group), member(&group));
        let read = |node: &NodeHandle| {
            let node = node.clone();
            async move { node.read_vec(&Ctx::GUEST, 0, 512).await.unwrap() }
        };
        read(&one).await;
        // The next one, which sleeps, and those behind it.
        for _ in 0..20 {
            assert!(rt::timeout(Duration::from_millis(1), read(&one)).await.is_none());
        }
        let done = Rc::new(Cell::new(None));
        let (told, reading) = (done.clone(), read(&other));
        rt::spawn(async move {
            reading.await;
            told.set(Some(rt::now()));
        });
        wait(2).await;
        assert!(done.get().unwrap() <= Duration::from_secs(1));
    });
}

#[test]
fn other_limits_hold_for_what_waits_already() {
    World::new(1).run(async {
        let group = group(ThrottleKind::BpsWrite, 1);
        let node = member(&group);
        let done = write(&node, 20);
        wait(100).await;
        assert_eq!(done.get(), 1);
        group.set_limits(ThrottleLimits::default());
        wait(0).await;
        assert_eq!(done.get(), 20);
    });
}
