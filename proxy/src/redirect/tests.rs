//! The redirect in network namespaces of its own, read back from the kernel. Root only (each test says so if it is not).

use super::*;

fn args(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn rules(line: &str) -> Rules {
    match parse(&args(&format!("install {line}"))).expect("the test's flags are right") {
        Command::Install(rules) => rules,
        other => panic!("{other:?}"),
    }
}

/// Runs `play` on a thread in a new, empty network namespace, which ends with the thread. Only root can make one: others
/// are told that the play was left out, which in CI is a failure.
fn in_namespace(play: impl FnOnce() + Send + 'static) {
    let played = std::thread::spawn(move || match unshare_net() {
        Ok(()) => play(),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && std::env::var_os("CI").is_none() => {
            eprintln!("left out: it makes a network namespace, which needs root");
        }
        Err(error) => panic!("making a network namespace: {error}"),
    });
    played.join().expect("the play ends well");
}

#[allow(unsafe_code, reason = "std has no unshare; the call has no memory effects")]
fn unshare_net() -> io::Result<()> {
    // SAFETY: unshare(CLONE_NEWNET) takes no pointers and changes only the calling thread.
    match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn differences(rules: &Rules) -> Vec<String> {
    match compare(rules) {
        Ok(()) => Vec::new(),
        Err(Error::Differs(differences)) => differences,
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn what_was_installed_is_read_back() {
    in_namespace(|| {
        let rules = rules(
            "--proxy-uid 2102 --proxy-mark 0x6d --skip-outbound-ports 25,8000-8010 --skip-inbound-ports 4190,4191,22",
        );
        install(&rules).expect("installs");
        assert_eq!(differences(&rules), Vec::<String>::new());
    });
}

#[test]
fn installing_again_replaces() {
    in_namespace(|| {
        let (old, new) = (rules("--proxy-uid 2102 --skip-outbound-ports 25"), rules("--proxy-mark 0x6d"));
        install(&old).expect("installs");
        install(&old).expect("installs again");
        assert_eq!(differences(&old), Vec::<String>::new());
        install(&new).expect("replaces");
        assert_eq!(differences(&new), Vec::<String>::new());
        assert_eq!(
            differences(&old),
            [
                "chain `outbound` has 3 rules where 4 are wanted",
                "rule 1 of chain `outbound` is another one",
                "rule 3 of chain `outbound` is another one"
            ]
        );
    });
}

#[test]
fn every_flag_makes_a_difference() {
    in_namespace(|| {
        let base = "--proxy-uid 2102 --proxy-mark 0x6d --skip-outbound-ports 25,80-90 --skip-inbound-ports 4190";
        install(&rules(base)).expect("installs");
        for (from, to) in
            [("2102", "2103"), ("0x6d", "0x6e"), ("25", "26"), ("80-90", "80-91"), ("80-90", "79-90"), ("4190", "4191")]
        {
            assert_eq!(differences(&rules(&base.replace(from, to))).len(), 1, "{from} -> {to}");
        }
        for flag in ["--inbound-port 5143", "--outbound-port 5140"] {
            assert_eq!(differences(&rules(&format!("{base} {flag}"))).len(), 1, "{flag}");
        }
    });
}

#[test]
fn networks_pass_by_in_both_directions_and_both_families() {
    in_namespace(|| {
        let base = "--proxy-uid 2102 --skip-subnets 10.1.0.0/16,192.0.2.7/32,fd00::/8";
        let ours = rules(base);
        install(&ours).expect("installs");
        assert_eq!(differences(&ours), Vec::<String>::new());
        for (from, to) in [("10.1.0.0/16", "10.1.0.0/17"), ("192.0.2.7", "192.0.2.8"), ("fd00::/8", "fc00::/7")] {
            assert_eq!(
                differences(&rules(&base.replace(from, to))).len(),
                2,
                "one rule on the way in and one on the way out: {from} -> {to}"
            );
        }
    });
}

#[test]
fn a_network_is_said_exactly() {
    let wrong = |text: &str| subnets(text).expect_err(text);
    for text in ["10.0.0.0", "10.0.0.0/33", "fd00::/129", "ten/8", "10.0.0.0/"] {
        assert_eq!(wrong(text), format!("{text} is not a network such as 10.1.0.0/16 or fd00::/8"));
    }
    assert_eq!(wrong("10.1.0.0/8"), "10.1.0.0/8 has address bits behind its length");
    assert_eq!(subnets("0.0.0.0/0"), Ok(vec![Subnet { first: vec![0; 4], last: vec![255; 4] }]));
    assert_eq!(subnets(""), Ok(Vec::new()));
}

#[test]
fn a_rule_put_in_by_someone_else_is_seen() {
    in_namespace(|| {
        let ours = rules("--proxy-uid 2102");
        install(&ours).expect("installs");
        let foreign = Chain { name: "outbound", hook: Hook::Output, rules: vec![nft::accept()] };
        Nft::open().and_then(|mut nft| nft.commit(Batch::new().chain(TABLE, &foreign))).expect("appends");
        assert_eq!(differences(&ours), ["chain `outbound` has 4 rules where 3 are wanted"]);
        let foreign = Chain { name: "extra", hook: Hook::Output, rules: Vec::new() };
        Nft::open().and_then(|mut nft| nft.commit(Batch::new().chain(TABLE, &foreign))).expect("adds");
        assert_eq!(differences(&ours).first().map(String::as_str), Some("there is a chain `extra` that is not ours"));
    });
}

#[test]
fn removed_is_gone_and_removing_twice_is_no_error() {
    in_namespace(|| {
        let ours = rules("--proxy-uid 2102");
        install(&ours).expect("installs");
        run(&Command::Remove).expect("removes");
        run(&Command::Remove).expect("removes nothing");
        let missing = run(&Command::Verify(ours)).expect_err("nothing is there").to_string();
        assert!(missing.starts_with("reading table `inet mantle`: No such file"), "{missing}");
        assert!(missing.contains("the redirect is not installed"), "{missing}");
    });
}

#[test]
fn a_transaction_is_all_or_nothing() {
    in_namespace(|| {
        let ours = rules("--proxy-uid 2102");
        install(&ours).expect("installs");
        // A redirect is refused in a chain whose hook knows no destination NAT of that kind: here, without a register.
        let broken = Chain { name: "outbound", hook: Hook::Output, rules: vec![nft::accept(), vec![4, 0, 1, 0x80]] };
        let batch = Batch::new().replace_table(TABLE, true).chain(TABLE, &broken);
        let refused = Nft::open().and_then(|mut nft| nft.commit(batch)).expect_err("a rule without a name").to_string();
        assert!(refused.starts_with("adding rule 2 of chain `outbound`:"), "{refused}");
        assert_eq!(differences(&ours), Vec::<String>::new());
    });
}

#[test]
fn a_namespace_that_leads_nowhere_is_no_proof() {
    in_namespace(|| {
        let ours = rules("--proxy-uid 2102");
        install(&ours).expect("installs");
        let refused = run(&Command::Verify(ours)).expect_err("no route").to_string();
        assert!(refused.contains("no route that leads out"), "{refused}");
    });
}

#[test]
fn every_mistake_is_reported_at_once() {
    let mistakes =
        parse(&args("install --inbound-port 0 --proxy-mark 0 --skip-outbound-ports 9-1 --colour red --proxy-uid"));
    assert_eq!(
        mistakes.expect_err("all wrong"),
        [
            "--inbound-port 0: a port is a number from 1 to 65535",
            "--proxy-mark 0: 0 is the mark of every socket; choose another",
            "--skip-outbound-ports 9-1: the range 9-1 is backwards",
            "--colour red: no such flag",
            "--proxy-uid needs a value",
            "without --proxy-uid or --proxy-mark the proxy's own connections would come back to it",
        ]
    );
}

#[test]
fn flags_are_read() {
    let read = rules("--proxy-uid=2102 --proxy-mark 0x6d --skip-inbound-ports 4190-4191, --skip-outbound-ports=");
    let range = PortRange { first: 4190, last: 4191 };
    assert_eq!((read.proxy_uid, read.proxy_mark), (Some(2102), Some(0x6d)));
    assert_eq!((read.skip_inbound, read.skip_outbound), (vec![range], Vec::new()));
    assert_eq!(parse(&args("remove")), Ok(Command::Remove));
}

#[test]
fn what_somebody_flushes_is_back_and_said() {
    in_namespace(|| {
        let ours = rules("--proxy-uid 2102 --skip-inbound-ports 4190,4191");
        let began = std::time::Instant::now();
        let mut guard = guard::Guard::new(ours.clone()).expect("subscribes");
        let repaired = guard.look().expect("installs");
        assert!(repaired.is_some(), "there was nothing yet");
        guard.wait().expect("its own change is news");
        assert!(guard.look().expect("looks").is_none(), "all is as it should be");

        Nft::open()
            .and_then(|mut nft| nft.commit(Batch::new().replace_table(TABLE, false)))
            .expect("removes the table");
        guard.wait().expect("news");
        let repaired = guard.look().expect("repairs").expect("something was wrong");
        assert!(repaired.0.contains("table `inet mantle`"), "{repaired:?}");
        assert_eq!(differences(&ours), Vec::<String>::new());

        install(&rules("--proxy-uid 2103")).expect("somebody else's rules");
        guard.wait().expect("news");
        let repaired = guard.look().expect("repairs").expect("something was wrong");
        assert!(repaired.0.contains("rule 1 of chain `outbound` is another one"), "{repaired:?}");
        assert_eq!(differences(&ours), Vec::<String>::new());
        assert!(began.elapsed() < guard::LOOK, "the kernel told of the changes; they were not found by looking");
    });
}
