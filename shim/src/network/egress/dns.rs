//! DNS messages (RFC 1035, 4), as far as a server needs them that knows addresses of names. Queries are a guest's.

use std::net::IpAddr;

const HEADER: usize = 12;
const MAX_LABEL: usize = 63;
/// With the lengths of its labels.
const MAX_NAME: usize = 255;
const INTERNET: u16 = 1;
/// A, and AAAA (RFC 3596).
const ADDRESS: u16 = 1;
const ADDRESS_6: u16 = 28;
/// Of the header's third byte: an answer; the kind of query; that recursion is wanted.
const ANSWER: u8 = 0x80;
const KIND: u8 = 0x78;
const WANTED: u8 = 0x01;
/// Of its fourth: recursion is to be had.
const AVAILABLE: u8 = 0x80;
/// Most addresses of an answer: so many of IPv6, of the longest name, are one datagram without extensions (512 bytes).
pub const MAX_ANSWERS: usize = 8;

/// Codes of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Fine = 0,
    /// The host could not find out.
    Failed = 2,
    NoSuchName = 3,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Address4,
    Address6,
    /// What we know nothing about.
    Other,
}

/// The only question of a query.
#[derive(Debug, PartialEq, Eq)]
pub struct Question<'a> {
    /// The header, and the question.
    asked: &'a [u8],
    /// In lower case, without a dot at its end. What no name of a list can have is replaced.
    pub name: String,
    pub kind: Kind,
}

impl<'a> Question<'a> {
    /// `None` if it is not one, or not of the internet.
    pub fn parse(query: &'a [u8]) -> Option<Self> {
        let header = query.get(..HEADER)?;
        let is_query = header[2] & (ANSWER | KIND) == 0 && header[4..6] == [0, 1];
        let (mut name, mut at) = (String::new(), HEADER);
        loop {
            let len = usize::from(*query.get(at)?);
            at += 1;
            if len == 0 {
                break;
            }
            if len > MAX_LABEL || at + len - HEADER >= MAX_NAME {
                return None;
            }
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(query.get(at..at + len)?.iter().map(|&byte| letter(byte)));
            at += len;
        }
        let word = |at: usize| Some(u16::from_be_bytes(query.get(at..at + 2)?.try_into().ok()?));
        let kind = match word(at)? {
            ADDRESS => Kind::Address4,
            ADDRESS_6 => Kind::Address6,
            _ => Kind::Other,
        };
        let of_internet = word(at + 2)? == INTERNET;
        (is_query && of_internet).then_some(Self { asked: &query[..at + 4], name, kind })
    }

    /// With those of the addresses that were asked for, [`MAX_ANSWERS`] at most. They are valid for so many seconds.
    pub fn answer(&self, code: Code, addresses: &[IpAddr], seconds: u32) -> Vec<u8> {
        let wanted = addresses.iter().filter(|address| match self.kind {
            Kind::Address4 => address.is_ipv4(),
            Kind::Address6 => address.is_ipv6(),
            Kind::Other => false,
        });
        let wanted: Vec<_> = wanted.take(MAX_ANSWERS).collect();
        let mut answer = self.asked.to_vec();
        answer[2] = ANSWER | answer[2] & WANTED;
        answer[3] = AVAILABLE | code as u8;
        answer[6..HEADER].copy_from_slice(&[0, wanted.len() as u8, 0, 0, 0, 0]);
        for address in wanted {
            let (kind, data) = match address {
                IpAddr::V4(address) => (ADDRESS, address.octets().to_vec()),
                IpAddr::V6(address) => (ADDRESS_6, address.octets().to_vec()),
            };
            // The name is the one after the header (4.1.4).
            answer.extend([0xc0, HEADER as u8]);
            answer.extend([kind, INTERNET].map(u16::to_be_bytes).as_flattened());
            answer.extend(seconds.to_be_bytes());
            answer.extend((data.len() as u16).to_be_bytes());
            answer.extend(data);
        }
        answer
    }
}

fn letter(byte: u8) -> char {
    match byte {
        b'-' | b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => {
            char::from(byte.to_ascii_lowercase())
        }
        _ => char::REPLACEMENT_CHARACTER,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn query(labels: &[&[u8]], kind: u16) -> Vec<u8> {
        let mut query = vec![0x12, 0x34, 1, 0x20, 0, 1, 0, 0, 0, 0, 0, 1];
        labels.iter().for_each(|label| {
            query.push(label.len() as u8);
            query.extend(*label);
        });
        query.push(0);
        query.extend([kind, 1].map(u16::to_be_bytes).as_flattened());
        // Extensions (RFC 6891) follow.
        [&query, &[0_u8, 0, 41, 4, 0xd0, 0, 0, 0, 0, 0, 0][..]].concat()
    }

    #[test]
    fn questions_are_answered_with_the_addresses_they_ask_for() {
        let query = query(&[b"Www", b"Example", b"org"], ADDRESS);
        let question = Question::parse(&query).unwrap();
        assert_eq!((&*question.name, question.kind), ("www.example.org", Kind::Address4));
        let addresses = [IpAddr::V6(Ipv6Addr::LOCALHOST), IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7))];
        let answer = question.answer(Code::Fine, &addresses, 30);
        let (asked, record) = answer.split_at(query.len() - 11);
        assert_eq!(asked[..12], [0x12, 0x34, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        assert_eq!(asked[12..], query[12..asked.len()]);
        assert_eq!(record, [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 192, 0, 2, 7]);
        let none = question.answer(Code::NoSuchName, &[], 0);
        assert_eq!((none[3], &none[6..8], none.len()), (0x83, &[0, 0][..], asked.len()));
    }

    #[test]
    fn the_longest_answer_is_one_datagram() {
        let label = [b'a'; MAX_LABEL];
        let query = query(&[&label, &label, &label, &[b'a'; 61]], ADDRESS_6);
        let question = Question::parse(&query).unwrap();
        let answer = question.answer(Code::Fine, &[Ipv6Addr::LOCALHOST.into(); 99], 30);
        assert_eq!(answer.len(), 12 + 255 + 4 + 8 * 28);
    }

    #[test]
    fn what_is_no_question_has_no_answer() {
        let good = query(&[b"a", b"b"], ADDRESS);
        let label = [b'a'; MAX_LABEL];
        assert_eq!(Question::parse(&query(&[&label, &label, &label, &label], ADDRESS)), None);
        (0..good.len() - 11).for_each(|len| assert_eq!(Question::parse(&good[..len]), None));
        // An answer, an update, two questions, a pointer for a name, another class.
        for (at, byte) in [(2, 0x80), (2, 0x28), (5, 2), (12, 0xc0), (20, 3)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert_eq!(Question::parse(&bad), None, "{at}");
        }
        let dotted = query(&[b"a.b\xff"], 65);
        let question = Question::parse(&dotted).unwrap();
        assert_eq!((&*question.name, question.kind), ("a\u{fffd}b\u{fffd}", Kind::Other));
    }

    proptest! {
        #[test]
        fn whatever_a_guest_asks_is_bounded(query in prop::collection::vec(any::<u8>(), 0..600)) {
            if let Some(question) = Question::parse(&query) {
                let answer = question.answer(Code::Fine, &[Ipv4Addr::LOCALHOST.into(); 20], 1);
                prop_assert!(question.name.len() < 4 * MAX_NAME && answer.len() <= 512);
            }
        }
    }
}
