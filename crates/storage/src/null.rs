//! Nothing, of any length.

use std::time::Duration;

use bytes::BytesMut;
use infill_base::{
    Ctx, ErrorKind, Extent, ExtentKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
    range_end,
};

use crate::{Storage, rt};

/// A storage that forgets what is written and reads as zeroes (QEMU's `null-co`): to measure what lies above it.
#[derive(Clone, Copy, Debug)]
pub struct NullStorage {
    /// Its length in bytes.
    pub len: u64,
    /// How long each request takes.
    pub latency: Duration,
    /// Whether its extents say that it is zero; else they call it data.
    pub tells_zero: bool,
}

impl NullStorage {
    async fn answer(&self, at: u64, len: u64) -> IoResult<()> {
        if range_end(at, len, self.len).is_none() {
            let why = format!("the range ends behind the null device, which has {} bytes", self.len);
            return Err(IoError::new(ErrorKind::InvalidInput, why).at(at, len));
        }
        if !self.latency.is_zero() {
            rt::sleep(self.latency).await;
        }
        Ok(())
    }
}

impl Storage for NullStorage {
    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn name(&self) -> String {
        "null-co://".into()
    }

    async fn read(&self, _cx: &Ctx, at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        self.answer(at, buf.len() as u64).await?;
        buf.fill(0);
        Ok(buf)
    }

    async fn write(&self, _cx: &Ctx, at: u64, data: Gather, _flags: WriteFlags) -> IoResult<()> {
        self.answer(at, data.len() as u64).await
    }

    async fn write_zeroes(&self, _cx: &Ctx, at: u64, len: u64, _flags: ZeroFlags) -> IoResult<()> {
        self.answer(at, len).await
    }

    async fn discard(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.answer(at, len).await
    }

    async fn sync(&self, _cx: &Ctx) -> IoResult<()> {
        self.answer(0, 0).await
    }

    async fn set_len(&self, _cx: &Ctx, _len: u64) -> IoResult<()> {
        // Forgotten like everything else.
        Ok(())
    }

    async fn extents(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.answer(at, len).await?;
        let kind = if self.tells_zero { ExtentKind::Zero } else { ExtentKind::Data };
        Ok(if len == 0 { Extents::new() } else { vec![Extent::new(at, len, kind)] })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn old_bytes_of_the_buffer_are_not_handed_back() {
        let null = NullStorage { len: 10, latency: Duration::ZERO, tells_zero: false };
        let buf = null.read(&Ctx::GUEST, 2, BytesMut::from(&[7; 8][..])).now_or_never().unwrap().unwrap();
        assert_eq!(buf[..], [0; 8]);
        assert!(null.read(&Ctx::GUEST, 3, buf).now_or_never().unwrap().is_err());
    }
}
