//! Connections: accepting them, bounding them in number and time, and letting them end in peace.
//!
//! Not `axum::serve`, which has no limit on how slowly a client may send its head or take its answer.

use std::{error::Error, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    time::{sleep, timeout},
};
use tokio_io_timeout::TimeoutStream;

use crate::{
    options::ServerOptions,
    router::{WrongOrigin, router},
    service::{Loaded, Service},
    state::App,
    trace::Exporter,
};

/// Threads for connections and JSON; computing has threads of its own. A second one was woken to look for work that the
/// first had, on processors that the model computes on.
const IO_THREADS: usize = 1;

/// Blocking threads beside those for pictures: parsing of large requests.
const PARSE_THREADS: usize = 4;

/// A server that listens and has no model yet.
pub struct Server {
    app: Arc<App>,
    router: Router,
    listener: std::net::TcpListener,
}

/// Why the server ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Pages are allowed to call that no browser could name.
    #[error(transparent)]
    Origin(#[from] WrongOrigin),
    /// The threads or signal handlers cannot be started.
    #[error("cannot start the server")]
    Start(#[source] io::Error),
    /// There is no model.
    #[error("cannot load the model")]
    Load(#[source] Box<dyn Error + Send + Sync>),
    /// The model is loaded and its forward pass fails.
    #[error("the model was loaded, but it cannot answer: {0}")]
    Unhealthy(String),
    /// Traces were asked for and cannot be exported.
    #[error("cannot export traces: {0}")]
    Traces(String),
    /// The sandbox was asked for and cannot be had.
    #[error("cannot enter the sandbox: {0}")]
    Sandbox(String),
}

impl Server {
    /// Listens. Requests are answered with 503 from now on.
    pub fn bind(options: ServerOptions) -> Result<Self, ServeError> {
        let address = options.address;
        let failed = |source| ServeError::Listen { address, source };
        let listener = std::net::TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let traces = Exporter::start(&options.traces).map_err(ServeError::Traces)?;
        let app = Arc::new(App::new(options, traces));
        // Here and not in the task that accepts: what is wrong with the options ends the start.
        let router = router(&app)?;
        Ok(Self { app, router, listener })
    }

    /// The address, with the port that was given where port 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap_or(self.app.options.address)
    }

    /// What the server shares with its requests.
    #[cfg(test)]
    pub(crate) fn app(&self) -> Arc<App> {
        self.app.clone()
    }

    /// Loads the model and serves until the process is asked to end (SIGTERM, SIGINT), then lets running answers
    /// finish, unless it is asked again.
    pub fn run(
        self,
        load: impl FnOnce() -> Result<Loaded, Box<dyn Error + Send + Sync>> + Send + 'static,
    ) -> Result<(), ServeError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(IO_THREADS)
            .max_blocking_threads(self.app.options.limits.media_tasks + PARSE_THREADS)
            .thread_name("http")
            .enable_all()
            .build()
            .map_err(ServeError::Start)?;
        let result = runtime.block_on(async {
            let mut signals = Signals::watch().map_err(ServeError::Start)?;
            let (sender, ends) = mpsc::unbounded_channel();
            tokio::spawn(async move {
                loop {
                    signals.next().await;
                    // The server has ended already if this fails.
                    let _ = sender.send(());
                }
            });
            self.serve(load, ends).await
        });
        // Whoever still decodes a picture does it for nobody.
        runtime.shutdown_timeout(Duration::from_millis(100));
        result
    }

    /// The same until `ends` says so, or has no sender any more, on a runtime that is there.
    pub(crate) async fn serve(
        self,
        load: impl FnOnce() -> Result<Loaded, Box<dyn Error + Send + Sync>> + Send + 'static,
        mut ends: mpsc::UnboundedReceiver<()>,
    ) -> Result<(), ServeError> {
        let app = self.app;
        let address = app.options.address;
        let listener =
            TcpListener::from_std(self.listener).map_err(|source| ServeError::Listen { address, source })?;
        let (stop, stopped) = watch::channel(());
        let accepting = tokio::spawn(accept(app.clone(), self.router, listener, stopped));
        let ready = async {
            get_ready(&app, load).await?;
            Ok(())
        };
        let result = tokio::select! {
            result = ready => match result {
                Ok(()) => {
                    ends.recv().await;
                    Ok(())
                }
                error => error,
            },
            _ = ends.recv() => Ok(()),
        };
        drain(&app, &mut ends).await;
        drop(stop);
        // The loop has ended, and with it its connections, or it panicked, and there are none.
        let _ = accepting.await;
        // Waits for the collector, on a thread that may.
        let _ = tokio::task::spawn_blocking(move || app.traces.as_ref().map(Exporter::finish)).await;
        result
    }
}

/// From no model to one that has answered.
async fn get_ready(
    app: &Arc<App>,
    load: impl FnOnce() -> Result<Loaded, Box<dyn Error + Send + Sync>> + Send + 'static,
) -> Result<(), ServeError> {
    let (sender, loaded) = tokio::sync::oneshot::channel();
    // A thread of its own: it may take minutes, and nobody waits for it when the server is asked to end.
    std::thread::Builder::new()
        .name("load".to_owned())
        .spawn(move || {
            // Nobody waits any more if this fails.
            let _ = sender.send(load());
        })
        .map_err(ServeError::Start)?;
    let loaded = loaded
        .await
        .map_err(|_| ServeError::Load("loading ended in a panic".into()))?
        .map_err(ServeError::Load)?;
    let service = Arc::new(Service::new(loaded));
    service.check_health().await.map_err(|error| ServeError::Unhealthy(error.to_string()))?;
    #[cfg(target_os = "linux")]
    {
        use crate::sandbox::{Outbound, enter};
        let is_outbound = app.options.fetch.enabled || app.traces.is_some();
        let outbound = if is_outbound { Outbound::Allowed } else { Outbound::Denied };
        enter(app.options.sandbox, outbound).map_err(ServeError::Sandbox)?;
    }
    #[cfg(not(target_os = "linux"))]
    if app.options.sandbox == crate::options::Sandbox::On {
        return Err(ServeError::Sandbox("there is one on Linux only".to_owned()));
    }
    let model = service.card().id.clone();
    let cache_mib = service.backend().stats().cache_limit >> 20;
    app.set_ready(service);
    tracing::info!(model, cache_mib, "ready");
    Ok(())
}

/// Refuses new requests and waits for those that are there, as long as they may take, and not beyond a second word
/// from `ends`.
async fn drain(app: &App, ends: &mut mpsc::UnboundedReceiver<()>) {
    app.set_draining();
    let waiting = app.requests_in_progress();
    tracing::info!(requests = waiting, "ending");
    let idle = async {
        while app.requests_in_progress() > 0 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let is_idle = tokio::select! {
        result = timeout(app.options.limits.drain_timeout, idle) => result.is_ok(),
        Some(()) = ends.recv() => false,
    };
    if !is_idle {
        tracing::warn!(requests = app.requests_in_progress(), "answers cut off");
    }
    if let Some(service) = app.loaded() {
        service.backend().stop();
    }
}

/// Accepts until told to stop, then lets connections end.
async fn accept(app: Arc<App>, router: Router, listener: TcpListener, mut stopped: watch::Receiver<()>) {
    let limits = &app.options.limits;
    let places = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    loop {
        let place = tokio::select! {
            place = places.clone().acquire_owned() => place.expect("the semaphore is never closed"),
            _ = stopped.changed() => break,
        };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, most likely: time heals it.
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            _ = stopped.changed() => break,
        };
        let connection = graceful.watch(connection(&app, stream, router.clone()));
        tokio::spawn(async move {
            // Errors here are the client's: gone, too slow, not HTTP.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection");
            }
            drop(place);
        });
    }
    drop(listener);
    let _ = timeout(Duration::from_secs(5), graceful.shutdown()).await;
}

type Io = TokioIo<std::pin::Pin<Box<TimeoutStream<TcpStream>>>>;

fn connection(
    app: &App,
    stream: TcpStream,
    router: Router,
) -> http1::Connection<Io, TowerToHyperService<Router>> {
    // Tokens are small and wanted at once. Where it cannot be had, they come a little later.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(app.options.limits.write_timeout));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(app.options.limits.read_timeout)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router))
}

/// What asks the process to end.
#[cfg(unix)]
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn watch() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What asks the process to end.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    #[expect(clippy::unnecessary_wraps, reason = "as on other systems")]
    fn watch() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        // Without a handler there is no signal to wait for.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
