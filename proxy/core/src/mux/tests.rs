//! Links as plays: two sessions back to back, hostile frames one by one, and random traffic with a fixed seed.

use std::collections::BTreeMap;

use super::*;
use crate::reasons::LinkClosed;

const MS: Duration = Duration::from_millis(1);

/// What a side has heard, in an owned form.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Heard {
    Open(StreamId, u16, Hinted),
    Data(StreamId, Vec<u8>),
    Fin(StreamId),
    Reset(StreamId, StreamReset),
    GoAway,
    Pong(u64),
}

/// Feeds bytes and writes down what happened; consumes data at once if told so.
fn feed(session: &mut Session, now: Duration, mut bytes: &[u8], consume: bool) -> Result<Vec<Heard>, LinkClosed> {
    let mut heard = Vec::new();
    while let Some(event) = session.receive(now, &mut bytes)? {
        match event {
            Event::Open { id, open } => heard.push(Heard::Open(id, open.port, open.protocol)),
            Event::Data { id, bytes, fin } => {
                if consume {
                    session.consume(id, bytes.len());
                }
                match heard.last_mut() {
                    Some(Heard::Data(last, have)) if *last == id => have.extend(bytes),
                    _ if !bytes.is_empty() => heard.push(Heard::Data(id, bytes.to_vec())),
                    _ => {}
                }
                if fin {
                    heard.push(Heard::Fin(id));
                }
            }
            Event::Reset { id, reason } => heard.push(Heard::Reset(id, reason)),
            Event::GoAway => heard.push(Heard::GoAway),
            Event::Pong(number) => heard.push(Heard::Pong(number)),
        }
    }
    Ok(heard)
}

struct Pair {
    dialler: Session,
    acceptor: Session,
    now: Duration,
    consume: bool,
}

impl Pair {
    fn with(limits: Limits) -> Self {
        let (dialler, acceptor) = (Session::new(Role::Dialler, limits), Session::new(Role::Acceptor, limits));
        let mut pair = Self { dialler, acceptor, now: Duration::ZERO, consume: true };
        assert_eq!(pair.dialler.open(pair.now, open(80)), Err(NoStream::NotReady));
        assert_eq!((pair.forth(), pair.back()), (vec![], vec![]));
        pair
    }

    /// Everything the dialler has to say; what the acceptor heard.
    fn forth(&mut self) -> Vec<Heard> {
        Self::carry(&mut self.dialler, &mut self.acceptor, self.now, self.consume)
    }

    fn back(&mut self) -> Vec<Heard> {
        Self::carry(&mut self.acceptor, &mut self.dialler, self.now, self.consume)
    }

    fn carry(from: &mut Session, to: &mut Session, now: Duration, consume: bool) -> Vec<Heard> {
        let mut wire = Vec::new();
        while from.wants_transmit() {
            from.transmit(now, &mut wire, 16 << 10);
        }
        feed(to, now, &wire, consume).unwrap()
    }

    fn open(&mut self, port: u16) -> StreamId {
        self.dialler.open(self.now, open(port)).unwrap()
    }
}

fn open(port: u16) -> Open {
    Open { port, protocol: Hinted::Http1, authority: Some("web-svc.emojivoto:80".into()) }
}

#[test]
fn a_request_and_its_response() {
    let mut pair = Pair::with(Limits::default());
    let id = pair.open(8080);
    assert_eq!(pair.dialler.send(MS, id, b"GET"), 3);
    pair.dialler.finish(MS, id);
    let request = [Heard::Open(1, 8080, Hinted::Http1), Heard::Data(1, b"GET".into()), Heard::Fin(1)];
    assert_eq!(pair.forth(), request);
    pair.acceptor.send(MS, id, b"200");
    pair.acceptor.finish(MS, id);
    assert_eq!(pair.back(), [Heard::Data(1, b"200".into()), Heard::Fin(1)]);
    assert_eq!((pair.dialler.open_streams(), pair.acceptor.open_streams()), (0, 0));
    assert!(!pair.dialler.wants_transmit() && !pair.acceptor.wants_transmit());
}

#[test]
fn opening_the_same_again_costs_two_bytes() {
    let mut pair = Pair::with(Limits::default());
    pair.open(80);
    pair.forth();
    let id = pair.open(80);
    pair.dialler.send(MS, id, b"x");
    pair.dialler.finish(MS, id);
    let mut wire = Vec::new();
    pair.dialler.transmit(MS, &mut wire, 16 << 10);
    assert_eq!(wire, [2, 3, 0, 3, 0, 0, 0, 2, 0, 0, b'x'], "a whole request in one frame");
    let heard = feed(&mut pair.acceptor, MS, &wire, true).unwrap();
    assert_eq!(heard, [Heard::Open(2, 80, Hinted::Http1), Heard::Data(2, b"x".into()), Heard::Fin(2)]);
}

#[test]
fn more_destinations_than_the_table_holds_still_open() {
    let mut pair = Pair::with(Limits::default());
    for port in 1..=300 {
        pair.open(port);
    }
    let ports = pair.forth().into_iter().map(|heard| match heard {
        Heard::Open(_, port, _) => port,
        other => panic!("{other:?}"),
    });
    assert!(ports.eq(1..=300));
}

#[test]
fn a_window_holds_the_sender_until_the_reader_has_read() {
    let mut pair = Pair::with(Limits::default());
    pair.consume = false;
    let id = pair.open(80);
    pair.forth();
    let bytes = vec![7; 100_000];
    assert_eq!(pair.dialler.send(MS, id, &bytes), 64 << 10);
    assert_eq!(pair.dialler.send(MS, id, &bytes), 0);
    assert_eq!(pair.forth(), [Heard::Data(1, vec![7; 64 << 10])]);
    assert_eq!(pair.dialler.send(MS, id, &bytes), 0);
    assert!(pair.dialler.take_writable().is_empty());
    pair.acceptor.consume(id, 32 << 10);
    assert!(pair.back().is_empty());
    assert_eq!(pair.dialler.take_writable(), [id]);
    assert_eq!(pair.dialler.send(MS, id, &bytes), 32 << 10);
}

#[test]
fn the_window_of_a_busy_stream_grows_and_the_link_bounds_the_growth() {
    let grown = |limits: Limits, wait: Duration| {
        let mut pair = Pair::with(limits);
        let id = pair.open(80);
        let bytes = vec![7; 1 << 20];
        for _ in 0..200 {
            pair.now += wait;
            pair.dialler.send(pair.now, id, &bytes);
            pair.forth();
            pair.back();
        }
        pair.acceptor.streams[&id].window
    };
    assert_eq!(grown(Limits::default(), MS), 1 << 20);
    assert_eq!(grown(Limits::default(), MS * 200), 128 << 10, "the first burst counts as busy");
    assert_eq!(grown(Limits { link_window: 512 << 10, ..Limits::default() }, MS), 256 << 10);
}

#[test]
fn a_stuck_stream_does_not_hold_the_others_and_the_link_window_bounds_all() {
    let limits = Limits { link_window: 256 << 10, ..Limits::default() };
    let mut pair = Pair::with(limits);
    pair.consume = false;
    let ids: Vec<_> = (0..6).map(|_| pair.open(80)).collect();
    let mut received = 0;
    for id in &ids {
        pair.dialler.send(MS, *id, &vec![7; 64 << 10]);
        for heard in pair.forth() {
            received += if let Heard::Data(_, bytes) = heard { bytes.len() } else { 0 };
        }
    }
    assert_eq!(received, 256 << 10, "four full windows");
    assert!(!pair.dialler.has_room());
    pair.acceptor.consume(ids[0], 64 << 10);
    pair.back();
    assert!(pair.dialler.has_room());
    let (mut waited, mut bytes) = (Vec::new(), 0);
    for heard in pair.forth() {
        let Heard::Data(id, data) = heard else { panic!("{heard:?}") };
        waited.push(id);
        bytes += data.len();
    }
    assert_eq!((&waited[..2], bytes), (&ids[4..], 64 << 10), "the last two, in turns");
}

#[test]
fn small_streams_go_before_bulk_and_bulk_streams_take_turns() {
    let limits = Limits { window: 1 << 20, ..Limits::default() };
    let mut pair = Pair::with(limits);
    let ids: Vec<_> = (0..3).map(|_| pair.open(80)).collect();
    pair.forth();
    pair.back();
    for _ in 0..4 {
        for id in &ids[..2] {
            pair.dialler.send(MS, *id, &vec![7; 64 << 10]);
        }
        let mut wire = Vec::new();
        pair.dialler.transmit(MS, &mut wire, 100 << 10);
        feed(&mut pair.acceptor, MS, &wire, true).unwrap();
    }
    pair.dialler.send(MS, ids[0], &vec![7; 64 << 10]);
    pair.dialler.send(MS, ids[1], &vec![7; 64 << 10]);
    pair.dialler.send(MS, ids[2], b"small");
    let order: Vec<_> = pair
        .forth()
        .into_iter()
        .map(|heard| match heard {
            Heard::Data(id, _) => id,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(order[0], ids[2]);
    assert!(order[1..].windows(2).all(|two| two[0] != two[1]), "{order:?}");
}

#[test]
fn frames_end_where_tls_records_end() {
    let mut pair = Pair::with(Limits::default());
    let id = pair.open(80);
    pair.forth();
    pair.back();
    pair.dialler.send(MS, id, &vec![7; 64 << 10]);
    let mut wire = Vec::new();
    pair.dialler.transmit(MS, &mut wire, 40 << 10);
    let mut at = 0;
    let mut ends = Vec::new();
    while at < wire.len() {
        at += 8 + usize::from(u16::from_be_bytes([wire[at + 2], wire[at + 3]]));
        ends.push(at);
    }
    assert!(
        ends.iter().all(|end| end % (16 << 10) == 0 || *end == wire.len() || end % (16 << 10) >= (16 << 10) - 2),
        "{ends:?}"
    );
}

#[test]
fn a_reset_ends_one_stream_and_what_crosses_it_is_ignored() {
    let mut pair = Pair::with(Limits::default());
    let (a, b) = (pair.open(80), pair.open(80));
    pair.dialler.send(MS, a, b"a");
    pair.forth();
    pair.back();
    pair.acceptor.reset(a, StreamReset::Denied);
    pair.dialler.send(MS, a, b"crossing");
    pair.dialler.send(MS, b, b"other");
    assert_eq!(pair.forth(), [Heard::Data(b, b"other".into())]);
    assert_eq!(pair.back(), [Heard::Reset(a, StreamReset::Denied)]);
    assert_eq!(pair.dialler.send(MS, a, b"gone"), 0);
    assert_eq!(pair.acceptor.link_owed, 1 + 8 + 5, "nothing of the link's window leaks");
    // Never announced: the peer hears nothing of it.
    let c = pair.open(81);
    pair.dialler.reset(c, StreamReset::Cancelled);
    assert_eq!(pair.forth(), []);
    assert_eq!(pair.dialler.waiting(), 0);
}

#[test]
fn every_reset_reason_crosses_the_wire() {
    let mut pair = Pair::with(Limits::default());
    for reason in StreamReset::ALL {
        let id = pair.open(80);
        pair.forth();
        pair.dialler.reset(id, *reason);
        assert_eq!(pair.forth(), [Heard::Reset(id, *reason)]);
    }
}

#[test]
fn goodbye_serves_what_crosses_it_and_stops_what_comes_later() {
    let mut pair = Pair::with(Limits::default());
    let kept = pair.open(80);
    pair.forth();
    pair.acceptor.go_away();
    let crossing = pair.open(80);
    assert_eq!(pair.forth(), [Heard::Open(crossing, 80, Hinted::Http1)]);
    assert_eq!(pair.back(), [Heard::GoAway]);
    assert_eq!(pair.dialler.open(MS, open(80)), Err(NoStream::GoingAway));
    assert!(pair.dialler.is_leaving() && !pair.dialler.has_room());
    pair.dialler.send(MS, kept, b"still");
    assert_eq!(pair.forth(), [Heard::Data(kept, b"still".into())]);
    // A peer that ends at once says which streams it did not look at.
    let mut pair = Pair::with(Limits::default());
    let (served, refused) = (pair.open(80), pair.open(80));
    pair.forth();
    let heard = feed(&mut pair.dialler, MS, &frame(6, 0, 0, served, &[]), true).unwrap();
    assert_eq!(heard, [Heard::GoAway, Heard::Reset(refused, StreamReset::Refused)]);
    assert_eq!(pair.dialler.open_streams(), 1);
    let mut pair = Pair::with(Limits::default());
    pair.dialler.go_away();
    assert_eq!(pair.forth(), [Heard::GoAway]);
    assert!(pair.acceptor.is_leaving());
}

#[test]
fn a_ping_is_answered() {
    let mut pair = Pair::with(Limits::default());
    pair.dialler.ping(42);
    assert_eq!(pair.forth(), []);
    assert_eq!(pair.back(), [Heard::Pong(42)]);
}

#[test]
fn the_peers_limits_hold() {
    let limits = Limits { max_streams: 2, window: 16 << 10, ..Limits::default() };
    let mut pair = Pair::with(limits);
    pair.back();
    let id = pair.open(80);
    pair.open(80);
    assert_eq!(pair.dialler.open(MS, open(80)), Err(NoStream::Full));
    assert_eq!(pair.dialler.send(MS, id, &[0; 20_000]), 16 << 10);
}

#[test]
fn a_peer_that_grants_nothing_loses_the_stream() {
    let mut pair = Pair::with(Limits { stall: MS * 100, ..Limits::default() });
    pair.consume = false;
    let id = pair.open(80);
    pair.dialler.send(MS, id, &vec![0; 70_000]);
    pair.forth();
    assert_eq!(pair.dialler.reset_stalled(MS * 100), []);
    assert_eq!(pair.dialler.reset_stalled(MS * 101), [id]);
    assert_eq!(pair.forth(), [Heard::Reset(id, StreamReset::Stalled)]);
}

/// `type flags length id payload`.
fn frame(kind: u8, flags: u8, length: u16, id: u32, payload: &[u8]) -> Vec<u8> {
    [&[kind, flags][..], &length.to_be_bytes(), &id.to_be_bytes(), payload].concat()
}

#[test]
fn hostile_frames_close_the_link_with_their_reason() {
    let settings = frame(0, 0, 6, 0, &[0, 1, 0, 0, 0, 1]);
    let fields = [1, 2, 0, 80, 2, 1, 0];
    let opening = |id| frame(1, 1, 7, id, &fields);
    let after_open = |more: &[u8]| [&settings[..], &opening(1), more].concat();
    let after_settings = |more: &[u8]| [&settings[..], more].concat();
    let open_with = |fields: &[u8]| after_settings(&frame(1, 0, fields.len() as u16, 1, fields));
    let data = |id, n: usize| frame(2, 0, n as u16, id, &vec![0; n]);
    let cases: Vec<(&str, Vec<u8>, LinkClosed)> = vec![
        ("data before settings", data(1, 1), LinkClosed::BadSettings),
        ("settings twice", after_settings(&settings), LinkClosed::BadSettings),
        ("another version", frame(0, 0, 6, 0, &[0, 1, 0, 0, 0, 2]), LinkClosed::BadSettings),
        ("no version", frame(0, 0, 0, 0, &[]), LinkClosed::BadSettings),
        ("half a setting", frame(0, 0, 5, 0, &[0, 1, 0, 0, 0]), LinkClosed::BadSettings),
        ("endless window", frame(0, 0, 12, 0, &[0, 1, 0, 0, 0, 1, 0, 2, 255, 0, 0, 0]), LinkClosed::BadSettings),
        ("unknown type", after_settings(&frame(7, 0, 0, 0, &[])), LinkClosed::BadFrame),
        ("unknown flag", after_open(&frame(2, 4, 1, 1, &[0])), LinkClosed::BadFrame),
        ("empty data", after_open(&data(1, 0)), LinkClosed::BadFrame),
        ("open too long", after_settings(&frame(1, 0, 1025, 1, &[])), LinkClosed::BadFrame),
        ("open without port", open_with(&[2, 1, 0]), LinkClosed::BadFrame),
        ("open to port 0", open_with(&[1, 2, 0, 0, 2, 1, 0]), LinkClosed::BadFrame),
        ("open with two ports", open_with(&[1, 2, 0, 1, 1, 2, 0, 2, 2, 1, 0]), LinkClosed::BadFrame),
        ("open with a strange hint", open_with(&[1, 2, 0, 1, 2, 1, 9]), LinkClosed::BadFrame),
        ("open with bad text", open_with(&[1, 2, 0, 1, 2, 1, 0, 3, 1, 255]), LinkClosed::BadFrame),
        ("open cut short", open_with(&[1, 2, 0, 1, 2, 1, 0, 3, 9]), LinkClosed::BadFrame),
        ("stream 0", after_settings(&opening(0)), LinkClosed::BadStream),
        ("same stream again", after_open(&opening(1)), LinkClosed::BadStream),
        ("an older stream", after_settings(&[opening(5), opening(4)].concat()), LinkClosed::BadStream),
        ("data for a stream that never was", after_open(&data(2, 1)), LinkClosed::BadStream),
        ("data for the link", after_open(&data(0, 1)), LinkClosed::BadStream),
        ("data after the end", after_open(&[frame(2, 1, 0, 1, &[]), data(1, 1)].concat()), LinkClosed::BadStream),
        ("reset of a stream that never was", after_open(&frame(4, 0, 0, 9, &[])), LinkClosed::BadStream),
        ("an entry the table has not", after_open(&frame(2, 2, 2, 2, &[0, 1])), LinkClosed::BadFrame),
        ("no room for the entry", after_open(&frame(2, 2, 1, 2, &[0, 0])), LinkClosed::BadFrame),
        ("beyond the window", after_open(&[data(1, 60_000), data(1, 5_537)].concat()), LinkClosed::WindowExceeded),
        ("no credit", after_open(&frame(3, 0, 0, 1, &[])), LinkClosed::BadFrame),
        ("too much credit", after_open(&frame(3, 0, (16 << 10) + 1, 1, &[])), LinkClosed::WindowExceeded),
        ("short ping", after_open(&frame(5, 0, 7, 0, &[0; 7])), LinkClosed::BadFrame),
        ("ping flood", after_open(&frame(5, 0, 8, 0, &[0; 8]).repeat(26_385)), LinkClosed::ControlRate),
        (
            "rapid reset",
            {
                let each = |id: u32| [opening(id + 1)[..].to_vec(), frame(4, 0, 0, id + 1, &[])].concat();
                let forgetful = |id: u32| each(id).into_iter().enumerate().map(|(i, b)| if i == 1 { 0 } else { b });
                after_settings(&(0..20_385).flat_map(forgetful).collect::<Vec<_>>())
            },
            LinkClosed::ResetRate,
        ),
        (
            "late frames",
            after_open(&[frame(4, 0, 0, 1, &[]), frame(3, 0, 1, 1, &[]).repeat(26_385)].concat()),
            LinkClosed::ControlRate,
        ),
        ("table overflow", after_settings(&(1..=257).flat_map(opening).collect::<Vec<_>>()), LinkClosed::BadFrame),
    ];
    for (what, wire, want) in cases {
        let mut session = Session::new(Role::Acceptor, Limits::default());
        assert_eq!(feed(&mut session, MS, &wire, false), Err(want), "{what}");
        let mut slow = Session::new(Role::Acceptor, Limits::default());
        let cut = wire.chunks(1).try_for_each(|byte| feed(&mut slow, MS, byte, false).map(drop));
        assert_eq!(cut, Err(want), "{what}, byte by byte");
    }
}

#[test]
fn a_killed_program_may_take_all_its_streams_with_it() {
    let mut pair = Pair::with(Limits::default());
    let ids: Vec<_> = (0..16_000).map(|_| pair.open(80)).collect();
    pair.forth();
    for id in ids {
        pair.dialler.reset(id, StreamReset::Cancelled);
    }
    assert_eq!(pair.forth().len(), 16_000, "the link goes on");
    assert_eq!(pair.acceptor.open_streams(), 0);
}

#[test]
fn rates_and_counts_have_their_own_reasons() {
    let settings = frame(0, 0, 6, 0, &[0, 1, 0, 0, 0, 1]);
    let opens: Vec<u8> = (1..=30).flat_map(|id| frame(1, 0, 7, id, &[1, 2, 0, 80, 2, 1, 0])).collect();
    let wire = [settings, opens].concat();
    for (limits, want) in [
        (Limits { opens_per_second: 10, ..Limits::default() }, LinkClosed::OpenRate),
        (Limits { max_streams: 29, ..Limits::default() }, LinkClosed::TooManyStreams),
    ] {
        assert_eq!(feed(&mut Session::new(Role::Acceptor, limits), MS, &wire, false), Err(want));
    }
    let mut dialler = Session::new(Role::Dialler, Limits::default());
    assert_eq!(feed(&mut dialler, MS, &wire, false), Err(LinkClosed::BadStream), "only the dialling side opens");
}

/// Random traffic in both directions, cut at random: every byte arrives once, in order, and everything ends.
#[test]
fn random_traffic_arrives_whole() {
    for seed in 1..=20 {
        let mut random = crate::testing::Random(seed);
        let mut pair = Pair::with(Limits { window: 4 << 10, link_window: 64 << 10, ..Limits::default() });
        let mut open_ids = Vec::new();
        let mut sent: BTreeMap<(bool, StreamId), usize> = BTreeMap::new();
        let mut got: BTreeMap<(bool, StreamId), usize> = BTreeMap::new();
        let mut ended = 0;
        for step in 0..3_000_u32 {
            pair.now += MS;
            let forth = random.below(2) == 0;
            let (from, to) =
                if forth { (&mut pair.dialler, &mut pair.acceptor) } else { (&mut pair.acceptor, &mut pair.dialler) };
            let opens = step < 2_000 && random.below(4) == 0 && forth;
            if opens && let Ok(id) = from.open(pair.now, open(80 + random.below(3) as u16)) {
                open_ids.push(id);
            }
            for _ in 0..random.below(4) {
                let Some(id) = open_ids.get(random.below(open_ids.len().max(1))) else { continue };
                let count = sent.entry((forth, *id)).or_default();
                let bytes: Vec<u8> = (0..random.below(9_000)).map(|i| (*count + i) as u8).collect();
                *count += from.send(pair.now, *id, &bytes);
                if random.below(6) == 0 || step > 2_000 {
                    from.finish(pair.now, *id);
                }
            }
            let mut wire = Vec::new();
            from.transmit(pair.now, &mut wire, random.below(40_000));
            let mut rest = &wire[..];
            while !rest.is_empty() {
                let (mut part, after) = rest.split_at(1 + random.below(rest.len()));
                rest = after;
                while let Some(event) = to.receive(pair.now, &mut part).unwrap() {
                    if let Event::Data { id, bytes, fin } = event {
                        let count = got.entry((forth, id)).or_default();
                        for byte in bytes {
                            assert_eq!(*byte, *count as u8, "seed {seed} stream {id}");
                            *count += 1;
                        }
                        ended += u32::from(fin);
                        let n = bytes.len();
                        to.consume(id, n);
                    }
                }
            }
        }
        for _ in 0..200 {
            for id in &open_ids {
                pair.dialler.finish(pair.now, *id);
                pair.acceptor.finish(pair.now, *id);
            }
            for (forth, heard) in [(true, pair.forth()), (false, pair.back())] {
                for heard in heard {
                    match heard {
                        Heard::Data(id, bytes) => *got.entry((forth, id)).or_default() += bytes.len(),
                        Heard::Fin(_) => ended += 1,
                        _ => {}
                    }
                }
            }
        }
        sent.retain(|_, count| *count > 0);
        got.retain(|_, count| *count > 0);
        assert_eq!(sent, got, "seed {seed}");
        assert_eq!(ended as usize, 2 * open_ids.len(), "seed {seed}");
        assert_eq!((pair.dialler.open_streams(), pair.acceptor.open_streams()), (0, 0), "seed {seed}");
        assert_eq!((pair.dialler.waiting(), pair.acceptor.waiting()), (0, 0));
    }
}

/// Random bytes, and random damage to good bytes: never a panic, and never more events than the limits allow.
#[test]
fn random_bytes_do_no_harm() {
    let mut good = Pair::with(Limits::default());
    let mut wire = Vec::new();
    for port in 0..20 {
        let id = good.open(80 + port % 3);
        good.dialler.send(MS, id, &vec![7; 300]);
        good.dialler.transmit(MS, &mut wire, 16 << 10);
    }
    for seed in 1..=2_000 {
        let mut random = crate::testing::Random(seed);
        let mut bytes = wire.clone();
        for _ in 0..1 + random.below(4) {
            let at = random.below(bytes.len());
            bytes[at] = random.next() as u8;
        }
        let mut session = Session::new(Role::Acceptor, Limits::default());
        if feed(&mut session, MS, &bytes, seed % 2 == 0).is_ok() {
            assert!(session.open_streams() <= 20);
        }
        let noise: Vec<u8> = (0..200).map(|_| random.next() as u8).collect();
        let _ = feed(&mut Session::new(Role::Dialler, Limits::default()), MS, &noise, true);
    }
}
