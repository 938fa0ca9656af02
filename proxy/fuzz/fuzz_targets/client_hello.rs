//! A decision about a prefix holds for every longer one, and detection agrees with the parser.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mantle_proxy_core::client_hello::{ClientHello, parse};
use mantle_proxy_core::detect::{Detected, detect};

fuzz_target!(|data: &[u8]| {
    let whole = parse(data);
    let half = parse(&data[..data.len() / 2]);
    assert!(half == ClientHello::NeedMore || half == whole);
    if matches!(whole, ClientHello::Hello { .. }) {
        assert_eq!(detect(data), Detected::Tls);
    }
    let early = detect(&data[..data.len() / 2]);
    assert!(early == Detected::NeedMore || early == detect(data));
});
