//! What is accepted and forwarded is read the same by the next reader, and carries no reserved header.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mantle_proxy_core::http1::{Asked, Edit, is_reserved, request, response};

fuzz_target!(|data: &[u8]| {
    let edit = Edit { strip_reserved: true, ..Edit::default() };
    if let Ok(Some(first)) = request(data) {
        let mut out = Vec::new();
        first.head.forward(&mut out, &edit);
        let second = request(&out).expect("was accepted before").expect("is whole");
        assert_eq!((second.method, second.target, second.body), (first.method, first.target, first.body));
        assert_eq!(second.head.size(), out.len());
        assert!(second.head.headers().all(|(name, _)| !is_reserved(name.as_bytes())));
    }
    for asked in [Asked::default(), Asked { head: true, connect: true, upgrade: true }] {
        if let Ok(Some(first)) = response(data, asked) {
            let mut out = Vec::new();
            first.head.forward(&mut out, &edit);
            let second = response(&out, asked).expect("was accepted before").expect("is whole");
            assert_eq!((second.status, second.body), (first.status, first.body));
        }
    }
});
