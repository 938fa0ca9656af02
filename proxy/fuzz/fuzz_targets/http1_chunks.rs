//! A chunked body ends at the same place however it is cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mantle_proxy_core::http1::{Body, Follower};

fuzz_target!(|data: &[u8]| {
    let mut whole = Follower::new(Body::Chunked);
    let at_once = whole.follow(data).map(|n| (n, whole.is_done()));
    let mut cut = Follower::new(Body::Chunked);
    let in_two = cut.follow(&data[..data.len() / 3]).and_then(|n| {
        let rest = if n == data.len() / 3 { cut.follow(&data[n..])? } else { 0 };
        Ok((n + rest, cut.is_done()))
    });
    assert_eq!(at_once, in_two);
});
