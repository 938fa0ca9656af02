//! No bytes make a session panic or exceed what it allows, and it closes with a reason at the same byte however cut.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use mantle_proxy_core::mux::{Event, Limits, Role, Session};
use mantle_proxy_core::reasons::LinkClosed;

fn feed(session: &mut Session, mut bytes: &[u8]) -> Result<usize, LinkClosed> {
    let mut taken = 0;
    while let Some(event) = session.receive(Duration::ZERO, &mut bytes)? {
        if let Event::Data { id, bytes, .. } = event {
            taken += bytes.len();
            session.consume(id, bytes.len());
        }
    }
    assert!(session.open_streams() <= Limits::default().max_streams as usize);
    Ok(taken)
}

fuzz_target!(|data: &[u8]| {
    for role in [Role::Acceptor, Role::Dialler] {
        let at_once = feed(&mut Session::new(role, Limits::default()), data);
        let mut session = Session::new(role, Limits::default());
        let in_two = feed(&mut session, &data[..data.len() / 2])
            .and_then(|n| feed(&mut session, &data[data.len() / 2..]).map(|m| n + m));
        assert_eq!(at_once, in_two);
        let mut out = Vec::new();
        session.transmit(Duration::ZERO, &mut out, 1 << 20);
    }
});
