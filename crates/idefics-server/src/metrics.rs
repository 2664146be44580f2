//! What Prometheus reads at `/metrics`.

use std::{
    fmt,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use idefics::generate::{EngineEvent, Stats, Usage};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::Histogram,
    },
    registry::Registry,
};

use crate::{backend::Backend, state::App, trace::AnswerFigures};

/// All that is counted here; what the engine counts is asked from it.
pub(crate) struct Metrics {
    requests: Family<RequestLabels, Counter>,
    request_seconds: Family<RouteLabels, Histogram, fn() -> Histogram>,
    queue_seconds: Histogram,
    first_token_seconds: Histogram,
    inter_token_seconds: Histogram,
    answer_seconds: Histogram,
    prompt_tokens: Counter,
    cached_prompt_tokens: Counter,
    generated_tokens: Counter,
    images: Counter,
    cached_images: Counter,
    cancelled: Counter,
    failed: Counter,
    /// Of finished answers, a running mean in microseconds: what a full queue is told.
    typical_micros: AtomicU64,
    engine: OnceLock<Weak<dyn Backend>>,
    resident: Option<ResidentMemory>,
    registry: OnceLock<Registry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: String,
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    route: String,
}

/// Times the answers to one prompt. Dropped before their end, they count as cancelled.
pub(crate) struct Stopwatch {
    app: Arc<App>,
    figures: Arc<AnswerFigures>,
    start: Instant,
    is_over: bool,
}

/// Times what happens on the way, on the engine's thread: when a client reads it does not count. Knows the figures
/// and not the server, which owns the engine.
pub(crate) struct Pace {
    queue_seconds: Histogram,
    first_token_seconds: Histogram,
    inter_token_seconds: Histogram,
    figures: Arc<AnswerFigures>,
    /// When the prompt was asked, and when the engine got it.
    asked: Instant,
    queued: Instant,
    last_token: Option<Instant>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        // 1 ms to about 9 minutes, and 100 µs to about 13 s between tokens.
        let seconds = || Histogram::new(powers_of_two(0.001, 20));
        let mut registry = Registry::with_prefix("idefics");
        let metrics = Self {
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(|| Histogram::new(powers_of_two(0.001, 20))),
            queue_seconds: seconds(),
            first_token_seconds: seconds(),
            inter_token_seconds: Histogram::new(powers_of_two(0.0001, 18)),
            answer_seconds: seconds(),
            prompt_tokens: Counter::default(),
            cached_prompt_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            images: Counter::default(),
            cached_images: Counter::default(),
            cancelled: Counter::default(),
            failed: Counter::default(),
            typical_micros: AtomicU64::new(0),
            engine: OnceLock::new(),
            resident: ResidentMemory::open(),
            registry: OnceLock::new(),
        };
        registry.register("requests", "HTTP requests by route and status", metrics.requests.clone());
        registry.register(
            "request_seconds",
            "From the head of a request to the end of its response",
            metrics.request_seconds.clone(),
        );
        for (name, help, histogram) in [
            ("queue_seconds", "In the engine's queue, until there is a place", &metrics.queue_seconds),
            (
                "time_to_first_token_seconds",
                "From a request to its first token",
                &metrics.first_token_seconds,
            ),
            ("inter_token_seconds", "Between the tokens of an answer", &metrics.inter_token_seconds),
            ("answer_seconds", "From a request to the end of its answer", &metrics.answer_seconds),
        ] {
            registry.register(name, help, histogram.clone());
        }
        for (name, help, counter) in [
            ("prompt_tokens", "Tokens of prompts", &metrics.prompt_tokens),
            (
                "cached_prompt_tokens",
                "Tokens of prompts that were read before",
                &metrics.cached_prompt_tokens,
            ),
            ("generated_tokens", "Tokens of answers", &metrics.generated_tokens),
            ("images", "Pictures of prompts", &metrics.images),
            ("cached_images", "Pictures that were encoded before", &metrics.cached_images),
            ("answers_cancelled", "Answers whose client went away", &metrics.cancelled),
            ("answers_failed", "Answers that the model failed to give", &metrics.failed),
        ] {
            registry.register(name, help, counter.clone());
        }
        assert!(metrics.registry.set(registry).is_ok(), "it was made above");
        metrics
    }

    /// Has the engine's figures among the others from now on.
    pub(crate) fn watch(&self, backend: &Arc<dyn Backend>) {
        // A second engine is never set.
        let _ = self.engine.set(Arc::downgrade(backend));
    }

    /// The text that Prometheus reads.
    pub(crate) fn render(&self, app: &App) -> String {
        let mut text = String::new();
        let registry = self.registry.get().expect("it was made with the metrics");
        let mut live = Registry::with_prefix("idefics");
        live.register_collector(Box::new(Live::of(app)));
        // `# EOF` ends a text, so only the last one keeps it.
        encode(&mut text, registry)
            .and_then(|()| {
                text.truncate(text.trim_end().trim_end_matches("# EOF").len());
                encode(&mut text, &live)
            })
            .expect("writing to a string cannot fail");
        text
    }

    pub(crate) fn request(&self, method: &str, route: &str, status: u16, took: Duration) {
        let route = route.to_owned();
        let labels = RequestLabels { method: method.to_owned(), route: route.clone(), status };
        self.requests.get_or_create(&labels).inc();
        self.request_seconds.get_or_create(&RouteLabels { route }).observe(took.as_secs_f64());
    }

    /// How long answers have taken of late.
    pub(crate) fn typical_wait(&self) -> Duration {
        Duration::from_micros(self.typical_micros.load(Ordering::Relaxed))
    }
}

impl Pace {
    pub(crate) fn note(&mut self, event: &EngineEvent) {
        match event {
            EngineEvent::Started => {
                let waited = self.queued.elapsed();
                self.queue_seconds.observe(waited.as_secs_f64());
                self.figures.started(waited);
            }
            EngineEvent::Token(event) if event.token_id.is_some() => self.token(),
            EngineEvent::Token(_) | EngineEvent::Finished(_) | EngineEvent::Failed(_) => {}
        }
    }

    fn token(&mut self) {
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => {
                self.first_token_seconds.observe((now - self.asked).as_secs_f64());
                self.figures.first_token(now - self.asked);
            }
            Some(last) => self.inter_token_seconds.observe((now - last).as_secs_f64()),
        }
    }
}

impl Stopwatch {
    pub(crate) fn start(app: Arc<App>, figures: Arc<AnswerFigures>) -> Self {
        figures.asked();
        Self { app, figures, start: Instant::now(), is_over: false }
    }

    /// The engine gets the prompt now.
    pub(crate) fn pace(&self) -> Pace {
        let metrics = &self.app.metrics;
        Pace {
            queue_seconds: metrics.queue_seconds.clone(),
            first_token_seconds: metrics.first_token_seconds.clone(),
            inter_token_seconds: metrics.inter_token_seconds.clone(),
            figures: self.figures.clone(),
            asked: self.start,
            queued: Instant::now(),
            last_token: None,
        }
    }

    pub(crate) fn finished(&mut self, usage: &Usage) {
        let metrics = &self.app.metrics;
        let took = self.start.elapsed();
        metrics.answer_seconds.observe(took.as_secs_f64());
        metrics.prompt_tokens.inc_by(usage.prompt_tokens as u64);
        metrics.generated_tokens.inc_by(usage.generated_tokens as u64);
        metrics.images.inc_by(usage.images as u64);
        metrics.cached_prompt_tokens.inc_by(usage.cached_tokens as u64);
        metrics.cached_images.inc_by(usage.cached_images as u64);
        self.figures.finished(usage);
        // A mean that forgets; lost updates between threads do no harm.
        let old = metrics.typical_micros.load(Ordering::Relaxed);
        let new = took.as_micros() as u64;
        metrics.typical_micros.store(if old == 0 { new } else { (7 * old + new) / 8 }, Ordering::Relaxed);
        tracing::info!(
            prompt_tokens = usage.prompt_tokens,
            cached_tokens = usage.cached_tokens,
            images = usage.images,
            generated_tokens = usage.generated_tokens,
            milliseconds = took.as_secs_f64() * 1e3,
            "answered"
        );
        self.is_over = true;
    }

    /// The request was refused before it ran.
    pub(crate) fn refused(mut self) {
        self.is_over = true;
    }

    pub(crate) fn failed(&mut self) {
        self.app.metrics.failed.inc();
        self.is_over = true;
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        if !self.is_over {
            self.app.metrics.cancelled.inc();
        }
    }
}

/// Figures that are asked for when they are read.
#[derive(Debug)]
struct Live(Vec<Sample>);

/// Name, what it says, kind, value.
type Sample = (&'static str, &'static str, SampleKind, f64);

#[derive(Debug, Clone, Copy)]
enum SampleKind {
    Counter,
    Gauge,
}

impl Live {
    fn of(app: &App) -> Self {
        let gauge = |name, help, value| (name, help, SampleKind::Gauge, value);
        let ready = app.loaded().is_some() && !app.is_draining();
        let mut samples = vec![
            gauge("ready", "Whether requests are answered", f64::from(u8::from(ready))),
            gauge("requests_in_progress", "Requests waiting and running", app.requests_in_progress() as f64),
        ];
        if let Some(bytes) = app.metrics.resident.as_ref().and_then(ResidentMemory::bytes) {
            samples.push(gauge(
                "resident_memory_bytes",
                "Memory of the process, mapped weights included",
                bytes,
            ));
        }
        if let Some(engine) = app.metrics.engine.get().and_then(Weak::upgrade) {
            samples.extend(engine_samples(&engine.stats()));
        }
        Self(samples)
    }
}

#[rustfmt::skip]
fn engine_samples(stats: &Stats) -> [Sample; 21] {
    use SampleKind::{Counter, Gauge};
    [
        ("engine_waiting", "Requests that wait for a place", Gauge, stats.waiting as f64),
        ("engine_running", "Requests that run", Gauge, stats.running as f64),
        ("engine_sequences", "Sequences that run", Gauge, stats.sequences as f64),
        ("engine_cache_bytes", "Keys, values and pictures of running requests", Gauge, stats.cache_bytes as f64),
        ("engine_image_bytes", "Pictures, used or kept", Gauge, stats.image_bytes as f64),
        ("engine_kept_bytes", "What is only kept for later requests", Gauge, stats.kept_bytes as f64),
        ("engine_cache_limit_bytes", "Limit on what is used and kept", Gauge, stats.cache_limit as f64),
        ("engine_accepted", "Requests that were taken", Counter, stats.accepted as f64),
        ("engine_rejected", "Requests that were refused", Counter, stats.rejected as f64),
        ("engine_finished", "Requests that were answered", Counter, stats.finished as f64),
        ("engine_cancelled", "Requests that were cancelled", Counter, stats.cancelled as f64),
        ("engine_failed", "Requests that failed", Counter, stats.failed as f64),
        ("engine_steps", "Steps of the model", Counter, stats.steps as f64),
        ("engine_rows", "Rows of these steps", Counter, stats.rows as f64),
        ("engine_tokens_read", "Tokens that were read", Counter, stats.tokens_read as f64),
        ("engine_prompt_tokens", "Prompt tokens of requests that ended", Counter, stats.prompt_tokens as f64),
        ("engine_generated_tokens", "Tokens of answers that ended", Counter, stats.generated_tokens as f64),
        ("engine_reused_tokens", "Tokens that an earlier request had read", Counter, stats.reused_tokens as f64),
        ("engine_images_encoded", "Pictures that went through the vision tower", Counter, stats.images_encoded as f64),
        ("engine_images_reused", "Pictures that did not have to", Counter, stats.images_reused as f64),
        ("engine_preemptions", "Requests that made room for older ones", Counter, stats.preemptions as f64),
    ]
}

impl Collector for Live {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, kind, value) in &self.0 {
            match kind {
                SampleKind::Counter => {
                    let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
                    ConstCounter::new(*value).encode(metric)?;
                }
                SampleKind::Gauge => {
                    let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
                    ConstGauge::new(*value).encode(metric)?;
                }
            }
        }
        Ok(())
    }
}

/// `/proc/self/statm`, opened while files may be opened.
struct ResidentMemory {
    #[cfg(target_os = "linux")]
    statm: std::fs::File,
}

impl ResidentMemory {
    #[cfg(target_os = "linux")]
    fn open() -> Option<Self> {
        std::fs::File::open("/proc/self/statm").ok().map(|statm| Self { statm })
    }

    #[cfg(target_os = "linux")]
    fn bytes(&self) -> Option<f64> {
        let mut text = [0; 128];
        let length = std::os::unix::fs::FileExt::read_at(&self.statm, &mut text, 0).ok()?;
        let pages = std::str::from_utf8(&text[..length]).ok()?.split(' ').nth(1)?.parse::<f64>().ok()?;
        Some(pages * rustix::param::page_size() as f64)
    }

    #[cfg(not(target_os = "linux"))]
    fn open() -> Option<Self> {
        None
    }

    #[cfg(not(target_os = "linux"))]
    fn bytes(&self) -> Option<f64> {
        None
    }
}

fn powers_of_two(first: f64, count: i32) -> impl Iterator<Item = f64> {
    (0..count).map(move |power| first * 2f64.powi(power))
}
