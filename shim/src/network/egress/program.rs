//! What decides about a socket of passt's (struct bpf_sock and bpf_sock_addr in include/uapi/linux/bpf.h). The verdict is 1,
//! to go on, or 0: the system call fails with EPERM.

use std::io;

use ampoule_agent_api::bpf::{
    ADD, CALL, EXIT, Instruction, JUMP_EQUAL, JUMP_NOT_EQUAL, Kind, LOAD_LONG, LOAD_WORD, MAP,
    MOVE, MOVE_REGISTER, Program, STORE_WORD, STORE_WORD_REGISTER, Set, op,
};

/// The kernel's function (enum bpf_func_id).
const MAP_LOOKUP: u32 = 1;

// What the registers hold.
const RESULT: u8 = 0;
const FIRST: u8 = 1;
const SECOND: u8 = 2;
const CONTEXT: u8 = 6;
const STACK: u8 = 10;

/// bpf_sock
const PROTOCOL: i16 = 12;
// bpf_sock_addr
const ADDRESS_4: i16 = 4;
const ADDRESS_6: i16 = 8;
/// In network order, in a word.
const PORT: i16 = 24;

/// Where the key is on the stack: 16 bytes of an address, then a port.
const KEY: i16 = -20;
const KEY_PORT: i16 = KEY + 16;
/// The third word of an IPv6 address that stands for one of IPv4, `::ffff:a.b.c.d`.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// All of them, as they are to be put on one cgroup.
pub fn all(set: &Set<20>) -> io::Result<Vec<Program>> {
    let (four, six) = (address(&FOUR, set), address(&SIX, set));
    [
        (Kind::SocketCreate, &create()[..]),
        (Kind::Connect4, &four),
        (Kind::Connect6, &six),
        (Kind::Send4, &four),
        (Kind::Send6, &six),
    ]
    .into_iter()
    .map(|(kind, program)| Program::load(kind, program))
    .collect()
}

/// Sockets are TCP's or UDP's: no ping, and nothing that the other programs are not asked about.
fn create() -> [Instruction; 6] {
    [
        op(LOAD_WORD, SECOND, FIRST, PROTOCOL, 0),
        op(MOVE, RESULT, 0, 0, 1),
        op(JUMP_EQUAL, SECOND, 0, 2, libc::IPPROTO_TCP as u32),
        op(JUMP_EQUAL, SECOND, 0, 1, libc::IPPROTO_UDP as u32),
        op(MOVE, RESULT, 0, 0, 0),
        op(EXIT, 0, 0, 0, 0),
    ]
}

/// A word of the key: a number, or a field of the context.
enum Word {
    Is(u32),
    Of(i16),
}

const FOUR: [Word; 4] = [Word::Is(0), Word::Is(0), Word::Is(MAPPED), Word::Of(ADDRESS_4)];
const SIX: [Word; 4] = [
    Word::Of(ADDRESS_6),
    Word::Of(ADDRESS_6 + 4),
    Word::Of(ADDRESS_6 + 8),
    Word::Of(ADDRESS_6 + 12),
];

/// The address must be in the set, with the port or with 0, which stands for all.
fn address(words: &[Word; 4], set: &Set<20>) -> Vec<Instruction> {
    let mut program = vec![op(MOVE_REGISTER, CONTEXT, FIRST, 0, 0)];
    for (word, at) in words.iter().zip((KEY..).step_by(4)) {
        match *word {
            Word::Is(number) => program.push(op(STORE_WORD, STACK, 0, at, number)),
            Word::Of(field) => program.extend(copy(field, at)),
        }
    }
    program.extend(copy(PORT, KEY_PORT));
    program.extend(look_up(set));
    // Over all that follows but its last two.
    program.push(op(JUMP_NOT_EQUAL, RESULT, 0, 7, 0));
    program.push(op(STORE_WORD, STACK, 0, KEY_PORT, 0));
    program.extend(look_up(set));
    program.push(op(JUMP_EQUAL, RESULT, 0, 1, 0));
    program.push(op(MOVE, RESULT, 0, 0, 1));
    program.push(op(EXIT, 0, 0, 0, 0));
    program
}

fn copy(field: i16, at: i16) -> [Instruction; 2] {
    [op(LOAD_WORD, SECOND, CONTEXT, field, 0), op(STORE_WORD_REGISTER, STACK, SECOND, at, 0)]
}

/// The result is a pointer, or 0.
fn look_up(set: &Set<20>) -> [Instruction; 5] {
    [
        op(MOVE_REGISTER, SECOND, STACK, 0, 0),
        op(ADD, SECOND, 0, 0, i32::from(KEY).cast_unsigned()),
        op(LOAD_LONG, FIRST, MAP, 0, set.number()),
        op(0, 0, 0, 0, 0),
        op(CALL, 0, 0, 0, MAP_LOOKUP),
    ]
}
