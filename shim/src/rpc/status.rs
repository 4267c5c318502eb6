//! The one place where an error becomes a ttrpc code.

use dyad_runtime_handler::Error;
use ttrpc::Code;

/// The status that containerd sees: the class as code, the whole chain as text.
pub fn status(error: &Error) -> ttrpc::Error {
    let code = match error {
        Error::InvalidArgument(_) => Code::INVALID_ARGUMENT,
        Error::NotFound(_) => Code::NOT_FOUND,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
        Error::Unimplemented(_) => Code::UNIMPLEMENTED,
        Error::Unavailable(..) => Code::UNAVAILABLE,
        Error::DeadlineExceeded(_) => Code::DEADLINE_EXCEEDED,
        Error::Other { .. } => Code::UNKNOWN,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.chain()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_can_tell_the_classes_apart() {
        for (error, code) in [
            (Error::NotFound("task x".into()), Code::NOT_FOUND),
            (
                Error::FailedPrecondition("x".into()),
                Code::FAILED_PRECONDITION,
            ),
            (Error::other("x", std::io::Error::other("y")), Code::UNKNOWN),
        ] {
            let ttrpc::Error::RpcStatus(got) = status(&error) else {
                panic!("not a status");
            };
            assert_eq!(got.code(), code);
            assert_eq!(got.message(), error.chain());
        }
    }
}
