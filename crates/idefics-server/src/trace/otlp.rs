//! Spans to a collector: OTLP as protobuf over HTTP, from a thread of its own that collects them for some seconds.
//!
//! All of OpenTelemetry's variables for exporters, samplers, batches and resources hold. Names of attributes are
//! those of its semantic conventions where there are any.

use std::{
    future::{Future, ready},
    pin::Pin,
    time::Duration,
};

use axum::{
    body::Bytes,
    http::{Request, Response},
};
use opentelemetry::{
    Context, Key, KeyValue,
    propagation::TextMapPropagator,
    trace::{Span, SpanBuilder, SpanKind, Status, Tracer, TracerProvider},
};
use opentelemetry_http::{HeaderExtractor, HttpClient, HttpError};
use opentelemetry_otlp::{
    OTEL_EXPORTER_OTLP_PROTOCOL, OTEL_EXPORTER_OTLP_TIMEOUT, OTEL_EXPORTER_OTLP_TIMEOUT_DEFAULT,
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, OTEL_EXPORTER_OTLP_TRACES_TIMEOUT, Protocol, SpanExporter,
    WithExportConfig, WithHttpConfig,
};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{SdkTracer, SdkTracerProvider},
};
use ureq::Agent;

use super::{Beginning, Ending, Figures, Traces, asked_by, of_process};

/// Most bytes of a collector's answer, of which nothing but a count of refused spans is read.
const ANSWER_BYTES: u64 = 64 << 10;

/// Where spans are collected and sent from.
pub(crate) struct Exporter {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// The span of a request that is being answered.
pub(crate) struct RequestSpan(opentelemetry_sdk::trace::Span);

impl Exporter {
    /// Starts it where one is asked for.
    pub(crate) fn start(traces: &Traces) -> Result<Option<Self>, String> {
        let endpoint = match traces {
            Traces::Off => return Ok(None),
            Traces::FromEnvironment if asked_by(of_process).is_none() => return Ok(None),
            Traces::FromEnvironment => None,
            Traces::To(endpoint) => Some(endpoint),
        };
        check_protocol(of_process)?;
        let client = Client::new(timeout(of_process));
        let builder = SpanExporter::builder().with_http().with_http_client(client);
        let builder = match endpoint {
            Some(endpoint) => builder.with_endpoint(endpoint),
            None => builder,
        };
        let exporter =
            builder.with_protocol(Protocol::HttpBinary).build().map_err(|error| error.to_string())?;
        let provider =
            SdkTracerProvider::builder().with_resource(resource()).with_batch_exporter(exporter).build();
        let tracer = provider.tracer(env!("CARGO_PKG_NAME"));
        tracing::info!("traces are exported");
        Ok(Some(Self { provider, tracer }))
    }

    pub(super) fn begin(&self, beginning: &Beginning<'_>) -> RequestSpan {
        let Beginning { method, route, request_id, headers } = *beginning;
        let propagator = TraceContextPropagator::new();
        let parent = propagator.extract_with_context(&Context::new(), &HeaderExtractor(headers));
        let attributes = [
            KeyValue::new("http.request.method", method),
            KeyValue::new("http.route", route.to_owned()),
            KeyValue::new("idefics.request.id", request_id.to_owned()),
        ];
        let span = SpanBuilder::from_name(format!("{method} {route}"))
            .with_kind(SpanKind::Server)
            .with_attributes(attributes);
        RequestSpan(self.tracer.build_with_context(span, &parent))
    }

    /// Sends what is left; no span is taken after it. Takes some seconds at most.
    pub(crate) fn finish(&self) {
        if let Err(error) = self.provider.shutdown() {
            tracing::warn!(%error, "the last traces were not delivered");
        }
    }
}

impl RequestSpan {
    /// What joins log lines with it.
    pub(crate) fn trace_id(&self) -> String {
        self.0.span_context().trace_id().to_string()
    }

    pub(crate) fn end(self, ending: &Ending<'_>) {
        let mut span = self.0;
        if let Some(status) = ending.status {
            span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
            if status >= 500 {
                span.set_attribute(KeyValue::new("error.type", status.to_string()));
                span.set_status(Status::error(""));
            }
        }
        if !ending.is_complete {
            span.set_attribute(KeyValue::new("idefics.client_left", true));
        }
        if let Some((model, figures)) = &ending.answers {
            span.set_attributes(of_answers(model, figures));
        }
        span.end();
    }
}

fn of_answers(model: &str, figures: &Figures) -> Vec<KeyValue> {
    let mut attributes = vec![KeyValue::new("gen_ai.response.model", model.to_owned())];
    let mut count = |name, value: usize| attributes.push(KeyValue::new(name, value as i64));
    if let Some(usage) = &figures.usage {
        count("gen_ai.usage.input_tokens", usage.prompt_tokens);
        count("gen_ai.usage.output_tokens", usage.generated_tokens);
        count("idefics.cached_tokens", usage.cached_tokens);
        count("idefics.images", usage.images);
        count("idefics.cached_images", usage.cached_images);
    }
    let times = [
        ("idefics.queue_seconds", figures.queued),
        ("idefics.time_to_first_token_seconds", figures.first_token),
    ];
    let known = times.into_iter().filter_map(|(name, time)| Some(KeyValue::new(name, time?.as_secs_f64())));
    attributes.extend(known);
    attributes
}

/// Who sends: `idefics`, unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` say another name.
fn resource() -> Resource {
    let builder =
        Resource::builder().with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    let name = Resource::builder().build().get(&Key::from_static_str("service.name"));
    let is_named = name.is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    if is_named { builder.build() } else { builder.with_service_name("idefics").build() }
}

/// Refuses forms of the protocol that are not built in, which the library would pass over.
fn check_protocol(variable: impl Fn(&str) -> Option<String>) -> Result<(), String> {
    let names = [OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, OTEL_EXPORTER_OTLP_PROTOCOL];
    let said = names.into_iter().find_map(|name| Some((name, variable(name).filter(|it| !it.is_empty())?)));
    match said {
        Some((name, protocol)) if protocol != "http/protobuf" => {
            Err(format!("{name}: expected `http/protobuf`, got `{protocol}`"))
        }
        _ => Ok(()),
    }
}

/// Time for one delivery.
fn timeout(variable: impl Fn(&str) -> Option<String>) -> Duration {
    [OTEL_EXPORTER_OTLP_TRACES_TIMEOUT, OTEL_EXPORTER_OTLP_TIMEOUT]
        .into_iter()
        .find_map(|name| variable(name)?.parse().ok())
        .map_or(OTEL_EXPORTER_OTLP_TIMEOUT_DEFAULT, Duration::from_millis)
}

/// Delivers on the exporter's thread, which has nothing else to do meanwhile.
#[derive(Debug)]
struct Client(Agent);

impl Client {
    fn new(timeout: Duration) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_global(Some(timeout));
        Self(config.build().into())
    }

    fn deliver(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let (head, mut body) = self.0.run(Request::from_parts(head, body.to_vec()))?.into_parts();
        let answer = body.with_config().limit(ANSWER_BYTES).read_to_vec()?;
        Ok(Response::from_parts(head, answer.into()))
    }
}

impl HttpClient for Client {
    // As the trait's macro writes it.
    fn send_bytes<'a, 'b>(&'a self, request: Request<Bytes>) -> Delivery<'b>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(ready(self.deliver(request)))
    }
}

type Delivery<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>;

#[cfg(test)]
mod tests {
    use super::*;

    fn look_up(variables: &'static [(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        |name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn other_forms_of_the_protocol_are_refused() {
        let check = |variables| check_protocol(look_up(variables));
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&[("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")]), Ok(()));
        assert_eq!(
            check(&[("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]).unwrap_err(),
            "OTEL_EXPORTER_OTLP_PROTOCOL: expected `http/protobuf`, got `grpc`"
        );
        // The one that is said of traces counts.
        let both = &[
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ];
        assert_eq!(check(both), Ok(()));
    }

    #[test]
    fn deliveries_have_a_time_in_milliseconds() {
        assert_eq!(timeout(look_up(&[])), Duration::from_secs(10));
        assert_eq!(timeout(look_up(&[("OTEL_EXPORTER_OTLP_TIMEOUT", "250")])), Duration::from_millis(250));
        assert_eq!(timeout(look_up(&[("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")])), Duration::from_secs(10));
    }
}
