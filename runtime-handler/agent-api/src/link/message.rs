//! Whether a guest's protobuf message may be decoded at all. Pure.
//!
//! A field of two bytes becomes a structure of a hundred or more, also one that the message
//! does not know, so the answer's size alone bounds nothing. Fields are counted before
//! anything is made of them.

use protobuf::Message;

use crate::proto::agent::GetFileResponse;

/// Fields of one message, those of the messages in it among them. With fewer it takes some
/// 10 MiB at worst; containerd's largest, the processes of a container, has five for each.
const MAX_FIELDS: usize = 1 << 16;

/// Messages in messages; deeper ones are taken for bytes.
const MAX_DEPTH: u32 = 8;

/// Whether `payload`, a message of type `M`, has few enough fields.
///
/// # Errors
/// It has more.
pub fn check<M: Message>(payload: &[u8]) -> Result<(), String> {
    // A file's bytes may look like any number of fields, and are no message.
    let flat = M::NAME == GetFileResponse::NAME;
    check_to(payload, if flat { 0 } else { MAX_DEPTH })
}

fn check_to(payload: &[u8], depth: u32) -> Result<(), String> {
    // So short a one cannot.
    if payload.len() <= MAX_FIELDS {
        return Ok(());
    }
    match count(payload, depth) {
        Some(fields) if fields > MAX_FIELDS => Err(format!(
            "the guest's answer has more than {MAX_FIELDS} fields"
        )),
        // What is no message is refused by whoever decodes it, before it takes much.
        _ => Ok(()),
    }
}

/// The fields of a message, up to one more than allowed; `None`: it is no message. Bytes that
/// happen to be one are counted, too: they are far from the bound.
fn count(mut rest: &[u8], depth: u32) -> Option<usize> {
    let mut fields = 0;
    while !rest.is_empty() {
        let tag = varint(&mut rest)?;
        if tag >> 3 == 0 {
            return None;
        }
        fields += 1;
        match tag & 7 {
            0 => drop(varint(&mut rest)?),
            1 => drop(take(&mut rest, 8)?),
            2 => {
                let length = varint(&mut rest)?;
                let inner = take(&mut rest, usize::try_from(length).ok()?)?;
                if depth > 0 {
                    fields += count(inner, depth - 1).unwrap_or(0);
                }
            }
            // Groups: their fields count as they come.
            3 | 4 => {}
            5 => drop(take(&mut rest, 4)?),
            _ => return None,
        }
        if fields > MAX_FIELDS {
            break;
        }
    }
    Some(fields)
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(taken)
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..70).step_by(7) {
        let (first, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(first & 0x7f).checked_shl(shift).unwrap_or(0);
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::agent::{StreamState, StreamsResponse};

    #[test]
    fn a_message_of_honest_size_passes() {
        let stream = |number: u32| StreamState {
            container_id: format!("{number:064}"),
            exec_id: format!("{number:064}"),
            fd: 1,
            offset: u64::MAX,
            end: u64::MAX,
            closed: true,
            ..Default::default()
        };
        let streams = StreamsResponse {
            streams: (0..3000).map(stream).collect(),
            ..Default::default()
        };
        check::<StreamsResponse>(&streams.write_to_bytes().unwrap()).unwrap();
        for byte in [0, 0x0a, 0x08, 0xff] {
            let file = GetFileResponse {
                data: vec![byte; 4 << 20],
                ..Default::default()
            };
            check::<GetFileResponse>(&file.write_to_bytes().unwrap()).unwrap();
        }
    }

    #[test]
    fn millions_of_empty_fields_are_refused_at_every_depth() {
        let empty = [0x0a, 0x00].repeat(1 << 20);
        let unknown = [0xf8, 0x07, 0x01].repeat(1 << 20);
        for fields in [empty, unknown] {
            assert!(check::<GetFileResponse>(&fields).is_err());
            let mut message = fields;
            for _ in 0..4 {
                assert!(check::<StreamsResponse>(&message).is_err());
                let mut outer = vec![0x0a];
                let mut length = message.len();
                while length > 0x7f {
                    outer.push(length as u8 | 0x80);
                    length >>= 7;
                }
                outer.push(length as u8);
                outer.append(&mut message);
                message = outer;
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_looked_at_without_a_panic(bytes: Vec<u8>, times in 1_usize..2000) {
            let _ = check_to(&bytes.repeat(times), MAX_DEPTH);
        }
    }
}
