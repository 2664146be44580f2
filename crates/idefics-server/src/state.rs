//! What all requests share, and whether the server is ready.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    error::{ApiError, Kind},
    metrics::Metrics,
    options::ServerOptions,
    service::Service,
    trace::{AnswerFigures, Exporter},
};

/// Uploads are counted in units of so many bytes.
pub(crate) const UPLOAD_UNIT: usize = 4 << 10;

/// The server's state.
pub(crate) struct App {
    pub(crate) options: ServerOptions,
    pub(crate) metrics: Metrics,
    pub(crate) traces: Option<Exporter>,
    /// One permit for each request, waiting and running.
    places: Arc<Semaphore>,
    /// One permit for [`UPLOAD_UNIT`] bytes of requests that are being read.
    pub(crate) uploads: Arc<Semaphore>,
    /// One permit for each picture or prompt that is processed off the async threads.
    pub(crate) media: Arc<Semaphore>,
    service: OnceLock<Arc<Service>>,
    draining: AtomicBool,
}

/// A request's place; given back when its answer is through, however it ends.
#[derive(Debug)]
pub(crate) struct Place {
    /// What the request's answers take, for who watches it.
    pub(crate) figures: Arc<AnswerFigures>,
    _permit: OwnedSemaphorePermit,
}

impl App {
    pub(crate) fn new(options: ServerOptions, traces: Option<Exporter>) -> Self {
        let limits = &options.limits;
        Self {
            metrics: Metrics::new(),
            traces,
            places: Arc::new(Semaphore::new(limits.requests)),
            uploads: Arc::new(Semaphore::new(limits.upload_bytes.div_ceil(UPLOAD_UNIT))),
            media: Arc::new(Semaphore::new(limits.media_tasks)),
            service: OnceLock::new(),
            draining: AtomicBool::new(false),
            options,
        }
    }

    /// From now on requests are answered.
    pub(crate) fn set_ready(&self, service: Arc<Service>) {
        self.metrics.watch(service.backend());
        assert!(self.service.set(service).is_ok(), "a server gets one model");
    }

    /// From now on requests are refused.
    pub(crate) fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// The model, or why there is none.
    pub(crate) fn service(&self) -> Result<&Arc<Service>, ApiError> {
        let unavailable = |message, code| {
            ApiError::new(Kind::Unavailable, message).code(code).retry_after(Duration::from_secs(5))
        };
        if self.is_draining() {
            return Err(unavailable("the server is shutting down", "shutting_down"));
        }
        self.service.get().ok_or_else(|| unavailable("the model is being loaded", "loading"))
    }

    /// The model, even while the server is shutting down.
    pub(crate) fn loaded(&self) -> Option<&Arc<Service>> {
        self.service.get()
    }

    /// A place for a request, whose answers are noted in `figures`.
    pub(crate) fn place(&self, figures: Arc<AnswerFigures>) -> Result<Place, ApiError> {
        let permit = self.places.clone().try_acquire_owned().map_err(|_| {
            ApiError::new(Kind::Overloaded, "too many requests are waiting; try again later")
                .code("queue_full")
                .retry_after(self.metrics.typical_wait())
        })?;
        Ok(Place { figures, _permit: permit })
    }

    /// Requests that have a place.
    pub(crate) fn requests_in_progress(&self) -> usize {
        self.options.limits.requests - self.places.available_permits()
    }
}
