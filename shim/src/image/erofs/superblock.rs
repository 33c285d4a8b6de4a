//! The superblock (`struct erofs_super_block`): the first block has nothing else.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::plan::Plan;
use super::{BLOCK, FormatError};
use crate::image::tree::ROOT;

const BLOCK_BITS: u8 = 12;
/// Where it stands in the image.
const SUPERBLOCK: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_CHECKSUM: u32 = 1;
const COMPAT_MTIME: u32 = 2;

/// The first block.
pub fn encode(plan: &Plan, id: [u8; 16]) -> [u8; BLOCK as usize] {
    let mut block = [0; BLOCK as usize];
    let mut put =
        |at: usize, bytes: &[u8]| block[SUPERBLOCK + at..][..bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_le_bytes());
    put(8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    put(12, &[BLOCK_BITS]);
    put(14, &(plan.place(ROOT).nid() as u16).to_le_bytes());
    put(16, &(plan.order().len() as u64).to_le_bytes());
    put(36, &(plan.blocks() as u32).to_le_bytes());
    put(48, &id);
    let sum = crc32c(&block[SUPERBLOCK..]);
    block[SUPERBLOCK + 4..][..4].copy_from_slice(&sum.to_le_bytes());
    block
}

/// Whether a file is a whole image as [`encode`] describes it. File contents are not looked at.
pub fn check(image: &File) -> Result<(), FormatError> {
    let mut block = [0; BLOCK as usize];
    let actual = image.metadata()?.len();
    if actual < BLOCK {
        return Err(FormatError::Length { expected: BLOCK, actual });
    }
    image.read_exact_at(&mut block, 0)?;
    let word = |block: &[u8], at: usize| {
        u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
    };
    let (magic, sum) = (word(&block, SUPERBLOCK), word(&block, SUPERBLOCK + 4));
    let expected = u64::from(word(&block, SUPERBLOCK + 36)) * BLOCK;
    block[SUPERBLOCK + 4..][..4].fill(0);
    match () {
        () if magic != MAGIC => Err(FormatError::Magic),
        () if sum != crc32c(&block[SUPERBLOCK..]) => Err(FormatError::Checksum),
        () if actual != expected => Err(FormatError::Length { expected, actual }),
        () => Ok(()),
    }
}

/// CRC-32C as the superblock wants it: seed of ones, no final inversion.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ (0x82f6_3b78 * (crc & 1)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_matches_its_published_check_value() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }
}
