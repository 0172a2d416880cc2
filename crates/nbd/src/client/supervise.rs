//! Keeps the connections up: makes the main one again when it is lost, and a second one for guests where that is allowed.
//!
//! * Attempts to connect begin [`BACKOFF_FIRST`] after the last one failed, doubling up to [`BACKOFF_MAX`], and beside
//!   one that is not answered for [`PATIENCE`]: what a dead link swallowed is not waited for once the link is back.
//!   So everything goes on within about a second of the server's return.
//! * A server that is not the one that was opened is not used; one that breaks the protocol is left, and tried again no
//!   faster than one that is away. For those who read, the right one may come back, so reads stay held, as after any
//!   other loss. A writable storage has writes that such a server will never get: after [`STRIKES_MAX`] broken sessions
//!   in a row its requests fail until a good one is back.
//! * Where requests wait, the source is away until it serves one: a server that is there and no use does not make the
//!   limit of [`OnLost::Hold`] begin anew. (One that serves some requests and never others is not away.)
//! * The second connection exists only for a read-only storage (with a writable one it could reach a server that has
//!   restarted while the first does not know yet, and read what is to be replayed), only where the server says
//!   CAN_MULTI_CONN, and only while the main one stands. Until it has been agreed on, guests use the main one: a server
//!   that never answers it costs nothing.

use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{Either, LocalBoxFuture, pending, select};
use futures_util::stream::FuturesUnordered;
use infill_base::{ErrorKind, IoError};
use infill_storage::rt;
use infill_storage::sync::Arc;

use super::negotiate::{Agreed, Failed, Open, negotiate};
use super::session::{Ended, Session};
use super::shared::{Role, Shared};
use super::{ClientOptions, OnLost};
use crate::proto::TransmissionFlags;

/// Pause before the second attempt to connect (the first comes at once).
const BACKOFF_FIRST: Duration = Duration::from_millis(20);
/// Longest pause between attempts.
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// How long an attempt is alone before another one begins beside it.
const PATIENCE: Duration = Duration::from_millis(500);
/// Sessions in a row that end with a broken protocol until writers are told.
const STRIKES_MAX: u32 = 3;
/// How long a session lasts that makes strikes before it count no more.
const STRIKES_KEPT: Duration = Duration::from_secs(60);
/// Longest pause before a second connection that was lost is opened again.
const DEMAND_BACKOFF_MAX: Duration = Duration::from_secs(30);

/// One attempt at a connection in the transmission phase, with its time limit.
pub(super) async fn open(shared: &Shared, limit: Duration) -> Result<Open, Failed> {
    connect(shared.connector.as_ref(), &shared.options, limit).await
}

/// As [`open`], before there is anything to share.
pub(super) async fn connect(
    connector: &dyn infill_storage::stream::Connector,
    options: &ClientOptions,
    limit: Duration,
) -> Result<Open, Failed> {
    let attempt =
        async { negotiate(connector.connect().await?, &options.export, options.tls.as_ref()).await };
    rt::timeout(limit, attempt).await.unwrap_or_else(|| {
        let why = format!("no connection was agreed on within {limit:?}");
        Err(Failed::Lost(IoError::new(ErrorKind::SourceLost, why)))
    })
}

/// How often, and when, attempts are made.
#[derive(Default)]
struct Retry {
    pause: Duration,
    strikes: u32,
    /// Since when requests wait for the source.
    away_since: Option<Duration>,
}

impl Retry {
    /// The pause before the next attempt; the one after that is longer.
    fn pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).clamp(BACKOFF_FIRST, BACKOFF_MAX);
        pause
    }

    /// The protocol was broken. Whether that was once too often.
    fn strike(&mut self) -> bool {
        self.strikes = self.strikes.saturating_add(1);
        self.strikes >= STRIKES_MAX
    }
}

/// Runs a client's connections until nobody needs them; without a `first` one, the source is away from the beginning.
pub(super) async fn supervise(shared: Arc<Shared>, first: Option<Open>) {
    let mut retry = Retry::default();
    let mut next = first;
    loop {
        let open = match next.take() {
            Some(open) => open,
            None => match reconnect(&shared, &mut retry).await {
                Some(open) => open,
                None => return,
            },
        };
        let began = rt::now();
        let session = Session::new(shared.clone(), Role::Main, open.agreed.clone());
        let agreed = open.agreed.clone();
        let demand = pin!(demand(&shared, &agreed));
        if !shared.connected() {
            retry.away_since = None;
        }
        let ended = match select(pin!(session.run(open)), demand).await {
            Either::Left((ended, _)) => ended,
            Either::Right((never, _)) => match never {},
        };
        let Ended::Failed(failed) = ended else { return };
        let broke = matches!(failed, Failed::Broke(_));
        if rt::now() - began >= STRIKES_KEPT || (session.has_served() && !broke) {
            retry = Retry::default();
        } else if session.has_served() {
            retry.away_since = None;
        }
        let too_often = broke && retry.strike();
        if !broke {
            retry.strikes = 0;
        }
        let error = IoError::from(failed);
        if too_often {
            // As often as it is tried, which may be for hours.
            tracing::debug!(storage = %shared.name, %error, "the connection was lost again");
        } else {
            tracing::warn!(storage = %shared.name, %error, "the connection was lost");
        }
        shared.lost(&error);
        if too_often {
            shared.no_use(&error);
        }
    }
}

enum Never {}

/// Connects again, until there is a good connection (`None`: until nobody needs one).
async fn reconnect(shared: &Shared, retry: &mut Retry) -> Option<Open> {
    let limit = shared.options.handshake_timeout;
    let now = rt::now();
    let lost = *retry.away_since.get_or_insert(now);
    let mut held_until = match shared.options.on_lost {
        OnLost::Hold { limit } => limit.and_then(|limit| lost.checked_add(limit)),
        OnLost::Fail => None,
    };
    let mut attempts: FuturesUnordered<LocalBoxFuture<'_, _>> = FuturesUnordered::new();
    let mut due = now + retry.pause();
    let mut refused = false;
    loop {
        let changed = shared.changed.listen();
        if shared.over() {
            return None;
        }
        let now = rt::now();
        if held_until.is_some_and(|until| until <= now) {
            held_until = None;
            let why = "the source is away for longer than requests are held";
            shared.stop_holding(&shared.error(ErrorKind::SourceLost, why));
        }
        if due <= now {
            attempts.push(Box::pin(open(shared, limit)));
            due = now + PATIENCE;
        }
        let wake_at = held_until.map_or(due, |until| until.min(due));
        let sleep = pin!(rt::sleep(wake_at - now));
        let attempt = async {
            match attempts.next().await {
                Some(attempt) => attempt,
                None => pending().await,
            }
        };
        let failed = match select(pin!(attempt), select(sleep, changed)).await {
            Either::Right(_) => continue,
            Either::Left((Ok(open), _)) => match shared.same_source(&open.agreed) {
                Ok(()) => return Some(open),
                Err(failed) => {
                    let error = IoError::from(failed.clone());
                    tracing::warn!(storage = %shared.name, %error, "not connected again");
                    shared.no_use(&error);
                    failed
                }
            },
            Either::Left((Err(failed), _)) => failed,
        };
        if matches!(failed, Failed::Broke(_)) && retry.strike() {
            shared.no_use(&IoError::from(failed.clone()));
        }
        let error = IoError::from(failed);
        if shared.state().changes == 0 {
            // It was not there from the beginning.
            shared.lost(&error);
        }
        // Credentials do not mend themselves: somebody has to know. Once, for this is tried on and on.
        if error.kind() == ErrorKind::NotPermitted && !std::mem::replace(&mut refused, true) {
            tracing::warn!(storage = %shared.name, %error, "not let in again; it is tried on");
        } else {
            tracing::debug!(storage = %shared.name, %error, "connecting again failed");
        }
        due = rt::now() + retry.pause();
    }
}

/// Keeps a second connection for guests beside a main one.
async fn demand(shared: &Arc<Shared>, main: &Agreed) -> Never {
    let options = &shared.options;
    let allowed = options.connections_max > 1
        && options.read_only
        && main.flags.contains(TransmissionFlags::CAN_MULTI_CONN);
    if !allowed {
        return pending().await;
    }
    let mut pause = BACKOFF_FIRST;
    loop {
        let open = match open(shared, options.open_timeout).await {
            Ok(open) if shared.same_source(&open.agreed).is_ok() => open,
            Ok(_) => break,
            Err(failed) => {
                // Not tried again beside this main connection: each try may cost the server a place in its queue.
                tracing::debug!(storage = %shared.name, error = %IoError::from(failed), "no second connection");
                break;
            }
        };
        let began = rt::now();
        {
            let session = Session::new(shared.clone(), Role::Demand, open.agreed.clone());
            let _up = DemandUp::new(shared);
            if let Ended::Failed(failed) = session.run(open).await {
                tracing::debug!(storage = %shared.name, error = %IoError::from(failed), "second connection lost");
            }
        }
        if rt::now() - began >= STRIKES_KEPT {
            pause = BACKOFF_FIRST;
        }
        rt::sleep(pause).await;
        pause = (pause * 2).min(DEMAND_BACKOFF_MAX);
    }
    pending().await
}

/// Guests use the second connection while this lives.
struct DemandUp<'a>(&'a Shared);

impl<'a> DemandUp<'a> {
    fn new(shared: &'a Shared) -> DemandUp<'a> {
        shared.state().demand = true;
        shared.wake();
        DemandUp(shared)
    }
}

impl Drop for DemandUp<'_> {
    fn drop(&mut self) {
        self.0.state().demand = false;
        self.0.wake();
    }
}
