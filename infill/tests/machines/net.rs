//! Two hosts as networks see them: a namespace each, joined by a link of limited bandwidth. Gone with their guard.

use std::process::Command;

use crate::common::{Process, run, wait_until};

/// How much goes over the link at a time, each way.
const RATE: &str = "200mbit";
/// What the token bucket lets through at once, and how long it keeps what has to wait.
const BURST: &str = "256kb";
const LATENCY: &str = "100ms";

/// A network namespace, which lives as long as the process that holds it.
pub struct Network {
    holder: Process,
    /// Of the host, in this network.
    pub address: &'static str,
}

impl Network {
    fn hold(command: &mut Command, others: &[&str], address: &'static str) -> Network {
        let holder = Process::start(command.args(["--net", "sleep", "infinity"]));
        let network = Network { holder, address };
        // Until then it is still the one that it was started in.
        wait_until("a network of its own", || {
            network.name().is_some_and(|name| !others.contains(&name.as_str()))
        });
        network
    }

    fn file(&self) -> String {
        format!("/proc/{}/ns/net", self.holder.id())
    }

    fn name(&self) -> Option<String> {
        Some(std::fs::read_link(self.file()).ok()?.to_string_lossy().into_owned())
    }

    /// Words that run a program in it, in front of the program's own: it becomes that program, under the same process id.
    fn enter(&self) -> Vec<String> {
        let mut words = vec!["nsenter".to_owned(), format!("--net={}", self.file())];
        if !rustix::process::geteuid().is_root() {
            words.push(format!("--user=/proc/{}/ns/user", self.holder.id()));
            words.push("--preserve-credentials".into());
        }
        words
    }

    /// A program of that host.
    pub fn command(&self, program: &str) -> Command {
        let words = self.enter();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(program);
        command
    }

    fn run(&self, line: &str) {
        let words = self.enter();
        let args: Vec<&str> = words[1..].iter().map(String::as_str).chain(line.split(' ')).collect();
        run(&words[0], &args);
    }
}

/// Two hosts, joined.
pub fn two() -> [Network; 2] {
    let own = std::fs::read_link("/proc/self/ns/net").unwrap().to_string_lossy().into_owned();
    let mut unshare = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let first = Network::hold(&mut unshare, &[&own], "192.0.2.1");
    let other = first.name().expect("it runs");
    let second = Network::hold(&mut first.command("unshare"), &[&own, &other], "192.0.2.2");
    first.run(&format!("ip link add name wire type veth peer name wire netns {}", second.holder.id()));
    for network in [&first, &second] {
        network.run("ip link set dev lo up");
        network.run(&format!("ip address add {}/24 dev wire", network.address));
        network.run("ip link set dev wire up");
        network.run(&format!("tc qdisc add dev wire root tbf rate {RATE} burst {BURST} latency {LATENCY}"));
    }
    [first, second]
}
