//! Disks: the image's root as a read-only EROFS file, made once per image; one sparse
//! ext4 disk per pod for all that is written.

pub mod apply;
pub mod cache;
pub mod plan;
mod view;
