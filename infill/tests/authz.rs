//! Who may come in, by the name in their certificate: `authz-simple`, `authz-list`, `tls-authz`, beside qemu-nbd and
//! qemu-storage-daemon, whose words and decisions are the same.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{INFILL, Process, fails, output, run, text, wait_for_socket};
use qmp::{Daemon, Program};
use serde_json::{Value, json};

/// Credentials in directories: `server`, and one for each client.
struct Certs(tempfile::TempDir);

/// Clients: the name in their certificates as `openssl` takes it, and as it is told.
const CLIENTS: [(&str, &str); 5] = [
    ("/C=GB/ST=London/O=Example/CN=laptop", "C=GB,ST=London,O=Example,CN=laptop"),
    (
        "/CN=a,b;c<d>e\"f=g h/OU=#x#/O= two  /L=back\\\\slash/ST=plus\\+x",
        "CN=a\\,b\\;c\\<d\\>e\\\"f=g h,OU=\\#x#,O=\\ two \\ ,L=back\\\\slash,ST=plus\\+x",
    ),
    ("/CN=Jürgen €/UID=u+DC=example", "CN=Jürgen €,UID=u+DC=example"),
    (
        "/emailAddress=a@b.c/SN=Sur/GN=Giv/title=Dr/street=S 1/serialNumber=77",
        "EMAIL=a@b.c,surName=Sur,givenName=Giv,title=Dr,street=S 1,serialNumber=77",
    ),
    ("/CN=tail ", "CN=tail\\ "),
];

impl Certs {
    fn new() -> Certs {
        let certs = Certs(tempfile::tempdir().unwrap());
        let (server, key) = (certs.dir("server"), ["-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
        std::fs::create_dir(&server).unwrap();
        let file = |name: &str| text(&server.join(name)).to_owned();
        let (ca, ca_key) = (file("ca-cert.pem"), file("ca-key.pem"));
        let authority = ["req", "-x509", "-newkey", "ec", "-keyout", &ca_key, "-out", &ca, "-subj", "/CN=ca"];
        run("openssl", &[&authority[..], &key, &["-days", "2"]].concat());
        certs.sign("server", "server", "/CN=localhost");
        for (nth, (subject, _)) in CLIENTS.iter().enumerate() {
            let dir = certs.dir(&nth.to_string());
            std::fs::create_dir(&dir).unwrap();
            std::fs::copy(&ca, dir.join("ca-cert.pem")).unwrap();
            certs.sign(&nth.to_string(), "client", subject);
        }
        certs
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn sign(&self, dir: &str, end: &str, subject: &str) {
        let file = |dir: &str, name: String| text(&self.dir(dir).join(name)).to_owned();
        let (key, cert) = (file(dir, format!("{end}-key.pem")), file(dir, format!("{end}-cert.pem")));
        let (request, names) = (file(dir, "request".into()), file(dir, "names".into()));
        let asked =
            ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-utf8"];
        run("openssl", &[&asked[..], &["-keyout", &key, "-out", &request, "-subj", subject]].concat());
        std::fs::write(&names, "subjectAltName=DNS:localhost\n").unwrap();
        let (ca, ca_key) = (file("server", "ca-cert.pem".into()), file("server", "ca-key.pem".into()));
        let signed = ["x509", "-req", "-in", &request, "-CA", &ca, "-CAkey", &ca_key, "-CAcreateserial"];
        run("openssl", &[&signed[..], &["-days", "2", "-out", &cert, "-extfile", &names]].concat());
    }

    /// Whether that client comes in at the server.
    fn comes_in(&self, client: usize, socket: &Path, export: &str) -> bool {
        let dir = self.dir(&client.to_string());
        let object = format!("tls-creds-x509,id=c,dir={},endpoint=client", text(&dir));
        let server = format!("driver=nbd,server.type=unix,server.path={}", text(socket));
        let image = format!("{server},export={export},tls-creds=c,tls-hostname=localhost");
        output("qemu-img", &["info", "--object", &object, "--image-opts", &image]).status.success()
    }
}

#[test]
fn those_come_in_whom_qemu_nbd_lets_in() {
    let certs = Certs::new();
    let disk = certs.0.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let creds = format!("tls-creds-x509,id=t,dir={},endpoint=server", text(&certs.dir("server")));
    let doubled = |name: &str| name.replace(',', ",,");
    // Each by its name alone, and lists.
    let mut objects: Vec<(String, Vec<usize>)> = (0..CLIENTS.len())
        .map(|nth| (format!("authz-simple,id=a,identity={}", doubled(CLIENTS[nth].1)), vec![nth]))
        .collect();
    let rule = |nth: usize, matches: &str, policy: &str, format: &str| {
        format!(
            ",rules.{nth}.match={},rules.{nth}.policy={policy},rules.{nth}.format={format}",
            doubled(matches)
        )
    };
    let first = rule(0, "CN=Jürgen*", "deny", "glob") + &rule(1, "CN=*", "allow", "glob");
    objects.push((format!("authz-list,id=a{first}"), vec![1, 4]));
    let exact = rule(0, CLIENTS[0].1, "deny", "exact") + &rule(1, "*", "deny", "exact");
    objects.push((format!("authz-list,id=a,policy=allow{exact}"), vec![1, 2, 3, 4]));
    objects.push(("authz-list,id=a".into(), vec![]));
    for (object, welcome) in objects {
        for program in [Program::Infill, Program::Qemu] {
            let socket = certs.0.path().join(format!("{program:?}.sock"));
            let _ = std::fs::remove_file(&socket);
            let mut command = match program {
                Program::Infill => Command::new(INFILL),
                Program::Qemu => Command::new("qemu-nbd"),
            };
            if program == Program::Infill {
                command.arg("qemu-nbd");
            }
            command.args([
                "-t",
                "-f",
                "raw",
                "-r",
                "-k",
                text(&socket),
                "--object",
                &creds,
                "--tls-creds",
                "t",
            ]);
            let _server =
                Process::start(command.args(["--object", &object, "--tls-authz", "a", text(&disk)]));
            wait_for_socket(&socket);
            let came: Vec<usize> =
                (0..CLIENTS.len()).filter(|client| certs.comes_in(*client, &socket, "")).collect();
            assert_eq!(came, welcome, "{program:?} {object}");
        }
    }
}

#[test]
fn objects_and_servers_are_made_as_by_qemu_storage_daemon_and_come_back_after_a_kill() {
    let certs = Certs::new();
    let mut told = Vec::new();
    let rules =
        json!([{"match": "C=*", "policy": "allow", "format": "glob"}, {"match": "b", "policy": "deny"}]);
    for program in [Program::Infill, Program::Qemu] {
        let dir = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(program, dir.path(), &[]);
        let mut qmp = daemon.connect();
        let mut answers = Vec::new();
        for (kind, more) in [
            ("authz-simple", json!({"id": "s", "identity": "CN=x"})),
            ("authz-simple", json!({"id": "s", "identity": "CN=x"})),
            ("authz-simple", json!({"id": "x"})),
            ("authz-list", json!({"id": "l", "rules": rules})),
            ("authz-list", json!({"id": "m", "policy": "allow"})),
            ("authz-list", json!({"id": "x", "rules": [{"match": "a"}]})),
            ("authz-list", json!({"id": "x", "rules": [{"policy": "deny"}]})),
            ("authz-list", json!({"id": "x", "policy": "maybe"})),
            ("authz-list", json!({"id": "x", "rules": [{"match": "a", "policy": "deny", "format": "re"}]})),
        ] {
            let mut object = more;
            object["qom-type"] = json!(kind);
            answers.push(qmp.ask("object-add", object));
        }
        for (id, property) in
            [("s", "identity"), ("l", "policy"), ("l", "rules"), ("m", "policy"), ("m", "rules")]
        {
            let path = format!("/objects/{id}");
            answers.push(qmp.ask("qom-get", json!({"path": path, "property": property})));
        }
        for name in ["authz-simple", "authz-list"] {
            answers.push(qmp.ask("qom-list-properties", json!({"typename": name})));
        }
        answers.push(qmp.ask("object-del", json!({"id": "m"})));
        daemon.quit(&mut qmp);
        told.push(answers);
    }
    for (ours, theirs) in told[0].iter().zip(&told[1]) {
        assert_eq!(ours, theirs, "ours, then qemu-storage-daemon's");
    }

    let dir = tempfile::tempdir().unwrap();
    let (state, socket) = (dir.path().join("state"), dir.path().join("nbd.sock"));
    let options = ["--state", text(&state)];
    let daemon = Daemon::start(Program::Infill, dir.path(), &options);
    let mut qmp = daemon.connect();
    let server = |id: &str, more: Value| {
        let mut object = json!({"qom-type": "tls-creds-x509", "id": id, "dir": text(&certs.dir("server")),
            "endpoint": "server"});
        object.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        object
    };
    qmp.run("object-add", server("t", json!({})));
    qmp.run("object-add", server("anybody", json!({"verify-peer": false})));
    qmp.run("object-add", json!({"qom-type": "authz-list", "id": "l", "rules": rules}));
    let addr = json!({"type": "unix", "data": {"path": text(&socket)}});
    for (more, why) in [
        (json!({"tls-authz": "l"}), "'tls-authz' is not permitted without 'tls-creds'"),
        (json!({"tls-authz": "x", "tls-creds": "t"}), "Cannot find QAuthZ object ID x"),
        (json!({"tls-authz": "t", "tls-creds": "t"}), "Cannot find QAuthZ object ID t"),
        (json!({"tls-authz": "l", "tls-creds": "anybody"}), "verify-peer=on"),
    ] {
        let mut start = more;
        start["addr"] = addr.clone();
        let error = qmp.refused("nbd-server-start", start);
        assert!(error["desc"].as_str().unwrap().contains(why), "{error}");
    }
    qmp.run("nbd-server-start", json!({"addr": addr, "tls-creds": "t", "tls-authz": "l"}));
    qmp.run("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": 1 << 20}));
    qmp.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "n"}));
    let came = || [0, 1].map(|client| certs.comes_in(client, &socket, "n"));
    assert_eq!(came(), [true, false]);
    daemon.process.kill();
    let daemon = Daemon::start(Program::Infill, dir.path(), &options);
    let mut qmp = daemon.connect();
    assert_eq!(came(), [true, false]);
    let error = qmp.refused("object-del", json!({"id": "l"}));
    assert_eq!(error["desc"], json!("object 'l' is in use, can not be deleted"));
    qmp.run("nbd-server-stop", json!({}));
    qmp.run("object-del", json!({"id": "l"}));
    daemon.quit(&mut qmp);
    let pam = fails(INFILL, &["daemon", "--object", "authz-pam,id=p,service=x"]);
    assert!(pam.contains("'authz-pam' are not supported"), "{pam}");
}
