//! nf_tables over a netlink socket: just the messages and expressions that the redirect needs, written and read back.
//!
//! A batch is one transaction. Expressions are byte strings in the kernel's own encoding (linux/netfilter/nf_tables.h), so
//! what was sent can be compared with what the kernel says it holds.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::Error;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NFTABLES: u16 = 10;
const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const GETCHAIN: u16 = 4;
const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
const INET: u8 = 1;
const NESTED: u16 = 0x8000;
/// `NF_IP_PRI_NAT_DST`, so that it comes before any source NAT and after connection tracking.
const PRIORITY: u32 = (-100_i32).cast_unsigned();
const ACCEPT: u32 = 1;

pub(super) const META_MARK: u32 = 3;
pub(super) const META_IIFNAME: u32 = 6;
pub(super) const META_OIFNAME: u32 = 7;
pub(super) const META_SKUID: u32 = 10;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;

/// A NAT base chain with its rules, each the concatenation of its expressions.
pub(super) struct Chain {
    pub(super) name: &'static str,
    pub(super) hook: Hook,
    pub(super) rules: Vec<Vec<u8>>,
}

#[derive(Clone, Copy)]
pub(super) enum Hook {
    Prerouting = 0,
    Output = 3,
}

/// A chain as the kernel reports it.
pub(super) struct Found {
    pub(super) name: String,
    attributes: Vec<u8>,
    rules: Vec<Vec<u8>>,
}

fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
    // Attributes here are a few hundred bytes; the kernel's length field has 16 bits.
    let length = u16::try_from(4 + value.len()).expect("attribute under 64 KiB");
    let mut out = Vec::with_capacity(4 + value.len().next_multiple_of(4));
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

fn nest(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attr(kind | NESTED, &parts.concat())
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    attr(kind, &[value.as_bytes(), b"\0"].concat())
}

fn word(kind: u16, value: u32) -> Vec<u8> {
    attr(kind, &value.to_be_bytes())
}

fn expression(name: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    nest(1, &[text(1, name), nest(2, attributes)])
}

pub(super) fn meta(key: u32) -> Vec<u8> {
    expression("meta", &[word(2, key), word(1, 1)])
}

pub(super) fn equal(value: &[u8]) -> Vec<u8> {
    expression("cmp", &[word(1, 1), word(2, 0), nest(3, &[attr(1, value)])])
}

pub(super) fn within(first: &[u8], last: &[u8]) -> Vec<u8> {
    expression("range", &[word(1, 1), word(2, 0), nest(3, &[attr(1, first)]), nest(4, &[attr(1, last)])])
}

pub(super) fn interface(name: &str) -> Vec<u8> {
    let mut padded = name.as_bytes().to_vec();
    padded.resize(16, 0);
    padded
}

pub(super) fn tcp() -> Vec<u8> {
    [meta(META_L4PROTO), equal(&[6])].concat()
}

/// Two bytes at offset 2 of the transport header.
pub(super) fn destination_port() -> Vec<u8> {
    expression("payload", &[word(1, 1), word(2, 2), word(3, 2), word(4, 2)])
}

/// An address of the network header.
#[derive(Clone, Copy)]
pub(super) enum Address {
    Source,
    Destination,
}

/// Loads an address, and the check that the packet is of its family at all (the table sees both).
pub(super) fn address(which: Address, v4: bool) -> (Vec<u8>, Vec<u8>) {
    let (family, offset, length) = match (v4, which) {
        (true, Address::Source) => (libc::NFPROTO_IPV4, 12, 4),
        (true, Address::Destination) => (libc::NFPROTO_IPV4, 16, 4),
        (false, Address::Source) => (libc::NFPROTO_IPV6, 8, 16),
        (false, Address::Destination) => (libc::NFPROTO_IPV6, 24, 16),
    };
    let load = expression("payload", &[word(1, 1), word(2, 1), word(3, offset), word(4, length)]);
    let family = u8::try_from(family).expect("a protocol family is a byte");
    (load, [meta(META_NFPROTO), equal(&[family])].concat())
}

/// Ends the evaluation of this hook: the packet keeps its destination.
pub(super) fn accept() -> Vec<u8> {
    expression("immediate", &[word(1, 0), nest(2, &[nest(2, &[word(1, ACCEPT)])])])
}

pub(super) fn redirect(port: u16) -> Vec<u8> {
    let value = expression("immediate", &[word(1, 1), nest(2, &[attr(1, &port.to_be_bytes())])]);
    // Both ends of the port range are register 1; the flag says that ports are given (NF_NAT_RANGE_PROTO_SPECIFIED).
    [value, expression("redir", &[word(1, 1), word(2, 1), word(3, 2)])].concat()
}

/// The messages of one transaction.
pub(super) struct Batch {
    messages: Vec<(u16, u16, Vec<u8>, String)>,
}

impl Batch {
    pub(super) const fn new() -> Self {
        Self { messages: Vec::new() }
    }

    fn put(mut self, kind: u16, flags: u16, attributes: Vec<u8>, doing: String) -> Self {
        self.messages.push((kind, flags, attributes, doing));
        self
    }

    /// Removes the table whether or not it is there; then makes it anew if `create`.
    pub(super) fn replace_table(self, table: &str, create: bool) -> Self {
        let add =
            |batch: Self| batch.put(NEWTABLE, NLM_F_CREATE, text(1, table), format!("making table `inet {table}`"));
        let empty = add(self).put(DELTABLE, 0, text(1, table), format!("removing table `inet {table}`"));
        if create { add(empty) } else { empty }
    }

    pub(super) fn chain(self, table: &str, chain: &Chain) -> Self {
        let names = [text(1, table), text(3, chain.name)].concat();
        let doing = format!("making the NAT chain `{}`", chain.name);
        let mut batch = self.put(NEWCHAIN, NLM_F_CREATE, [names, base_chain(chain.hook)].concat(), doing);
        for (index, rule) in chain.rules.iter().enumerate() {
            let attributes = [text(1, table), text(2, chain.name), attr(4 | NESTED, rule)].concat();
            let doing = format!("adding rule {} of chain `{}`", index + 1, chain.name);
            batch = batch.put(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, attributes, doing);
        }
        batch
    }
}

fn base_chain(hook: Hook) -> Vec<u8> {
    [nest(4, &[word(1, hook as u32), word(2, PRIORITY)]), word(5, ACCEPT), text(7, "nat")].concat()
}

/// A netlink socket of the calling thread's network namespace.
pub(super) struct Nft {
    socket: Socket,
    sequence: u32,
}

impl Nft {
    pub(super) fn open() -> Result<Self, Error> {
        let protocol = Protocol::from(libc::NETLINK_NETFILTER);
        Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(protocol))
            .and_then(|socket| {
                // The kernel answers inside `send`; a silent one is a kernel without this subsystem.
                socket.set_read_timeout(Some(Duration::from_secs(5)))?;
                Ok(Self { socket, sequence: 0 })
            })
            .map_err(kernel("opening a netfilter netlink socket"))
    }

    /// A socket that is told of every change to the namespace's tables; `news` returns after `patience` without any.
    pub(super) fn subscribe(patience: Duration) -> Result<Self, Error> {
        let mut nft = Self::open()?;
        // A first question gives the socket its address; without one it is a member that nothing is sent to.
        nft.ask(GETCHAIN, NLM_F_DUMP, &[], "reading chains")?;
        join(&nft.socket, libc::NFNLGRP_NFTABLES)
            .and_then(|()| nft.socket.set_read_timeout(Some(patience)))
            .map_err(kernel("asking for news of nf_tables"))?;
        Ok(nft)
    }

    /// Waits for a change, whatever it is. Changes that came too fast to be told (ENOBUFS) are one, too.
    pub(super) fn news(&mut self) -> Result<(), Error> {
        match self.receive() {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            Err(error) => Err(kernel("waiting for news of nf_tables")(error)),
        }
    }

    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
        self.sequence += 1;
        let length = u32::try_from(20 + attributes.len()).expect("a message is small");
        let mut out = Vec::with_capacity(20 + attributes.len());
        out.extend(length.to_ne_bytes());
        out.extend(kind.to_ne_bytes());
        out.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        out.extend(self.sequence.to_ne_bytes());
        out.extend(0_u32.to_ne_bytes());
        out.extend([family, 0]);
        out.extend(resource.to_be_bytes());
        out.extend(attributes);
        out
    }

    /// All or nothing. Only the last message asks for an answer; a refused one is answered anyway.
    pub(super) fn commit(&mut self, batch: Batch) -> Result<(), Error> {
        let mut doing = vec!["talking to nf_tables".to_owned()];
        let mut bytes = self.message(BATCH_BEGIN, 0, 0, NFTABLES, &[]);
        let first = self.sequence;
        let last_index = batch.messages.len() - 1;
        for (index, (kind, flags, attributes, what)) in batch.messages.into_iter().enumerate() {
            let ack = if index == last_index { NLM_F_ACK } else { 0 };
            bytes.extend(self.message(NFTABLES << 8 | kind, flags | ack, INET, 0, &attributes));
            doing.push(what);
        }
        let last = self.sequence;
        bytes.extend(self.message(BATCH_END, 0, 0, NFTABLES, &[]));
        self.socket.write_all(&bytes).map_err(kernel(&doing[0]))?;
        let mut refused: Option<Error> = None;
        loop {
            for reply in self.receive().map_err(kernel(&doing[0]))? {
                if reply.kind != NLMSG_ERROR {
                    continue;
                }
                if let (Some(error), None) = (reply.error(), &refused) {
                    let what = doing.get((reply.sequence - first) as usize).unwrap_or(&doing[0]);
                    refused = Some(Error::Kernel { doing: what.clone(), error });
                }
                // An answer to the opening message refuses the batch as a whole.
                if reply.sequence == first || reply.sequence == last {
                    return refused.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// The chains of a table and their rules, as the kernel holds them now.
    pub(super) fn read(&mut self, table: &str) -> Result<Vec<Found>, Error> {
        self.ask(GETTABLE, 0, &text(1, table), &format!("reading table `inet {table}`"))?;
        let mut chains = Vec::new();
        for attributes in self.ask(GETCHAIN, NLM_F_DUMP, &[], "reading chains")? {
            if find(&attributes, 1).map(string) == Some(table.to_owned()) {
                let name = find(&attributes, 3).map(string).unwrap_or_default();
                chains.push(Found { name, attributes, rules: Vec::new() });
            }
        }
        for attributes in self.ask(GETRULE, NLM_F_DUMP, &text(1, table), "reading rules")? {
            if find(&attributes, 1).map(string) != Some(table.to_owned()) {
                continue;
            }
            let name = find(&attributes, 2).map(string).unwrap_or_default();
            if let Some(chain) = chains.iter_mut().find(|chain| chain.name == name) {
                chain.rules.push(find(&attributes, 4).unwrap_or_default().to_vec());
            }
        }
        Ok(chains)
    }

    /// A question and the attributes of each answer.
    fn ask(&mut self, kind: u16, flags: u16, attributes: &[u8], doing: &str) -> Result<Vec<Vec<u8>>, Error> {
        let question = self.message(NFTABLES << 8 | kind, flags | NLM_F_ACK, INET, 0, attributes);
        self.socket.write_all(&question).map_err(kernel(doing))?;
        let mut answers = Vec::new();
        loop {
            for reply in self.receive().map_err(kernel(doing))? {
                match reply.kind {
                    NLMSG_DONE => return Ok(answers),
                    NLMSG_ERROR => return reply.error().map_or(Ok(answers), |error| Err(kernel(doing)(error))),
                    _ => answers.push(reply.body.get(4..).unwrap_or_default().to_vec()),
                }
            }
        }
    }

    fn receive(&mut self) -> io::Result<Vec<Reply>> {
        let mut buffer = vec![0; 1 << 16];
        let length = self.socket.read(&mut buffer)?;
        let mut rest = &buffer[..length];
        let mut replies = Vec::new();
        while let Some((header, _)) = rest.split_at_checked(16) {
            let size = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let Some(body) = rest.get(16..size) else { break };
            replies.push(Reply {
                kind: u16::from_ne_bytes([header[4], header[5]]),
                sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
                body: body.to_vec(),
            });
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(replies)
    }
}

#[allow(unsafe_code, reason = "socket2 has no name for this option")]
fn join(socket: &Socket, group: libc::c_int) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("an int is small");
    // SAFETY: the option's value is a valid local int of the size given; the descriptor lives as long as `socket`.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_ADD_MEMBERSHIP,
            (&raw const group).cast(),
            size,
        )
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

struct Reply {
    kind: u16,
    sequence: u32,
    body: Vec<u8>,
}

impl Reply {
    /// The errno of an NLMSG_ERROR; zero is the acknowledgement.
    fn error(&self) -> Option<io::Error> {
        let code = self.body.first_chunk::<4>().map_or(-libc::EBADMSG, |bytes| i32::from_ne_bytes(*bytes));
        (code != 0).then(|| io::Error::from_raw_os_error(-code))
    }
}

fn kernel(doing: &str) -> impl FnOnce(io::Error) -> Error + use<> {
    let doing = doing.to_owned();
    move |error| Error::Kernel { doing, error }
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk::<2>()?));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| k & !NESTED == kind).map(|(_, value)| value)
}

fn string(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(b"\0").unwrap_or(value)).into_owned()
}

/// Every attribute that was sent is there with the same value. Newer kernels may report more of them, hence not equality.
fn holds(sent: &[u8], read: &[u8]) -> bool {
    attributes(sent).all(|(kind, value)| {
        find(read, kind & !NESTED).is_some_and(|is| if kind & NESTED == 0 { is == value } else { holds(value, is) })
    })
}

/// What of `wanted` the kernel does not hold, in words.
pub(super) fn differences(wanted: &Chain, found: &Found) -> Vec<String> {
    let mut out = Vec::new();
    if !holds(&base_chain(wanted.hook), &found.attributes) {
        out.push(format!("chain `{}` is not on its hook, or with another priority or policy", wanted.name));
    }
    if wanted.rules.len() != found.rules.len() {
        let (is, want) = (found.rules.len(), wanted.rules.len());
        out.push(format!("chain `{}` has {is} rules where {want} are wanted", wanted.name));
    }
    for (index, (want, is)) in wanted.rules.iter().zip(&found.rules).enumerate() {
        let sent: Vec<_> = attributes(want).collect();
        let read: Vec<_> = attributes(is).collect();
        if sent.len() != read.len() || !sent.iter().zip(&read).all(|((_, s), (_, r))| holds(s, r)) {
            out.push(format!("rule {} of chain `{}` is another one", index + 1, wanted.name));
        }
    }
    out
}
