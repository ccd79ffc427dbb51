// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The figures of a VM as OpenMetrics text, for Prometheus and what reads its formats.

use std::fmt::Error;
use std::sync::Arc;
use std::time::Duration;

use demand_memory::{FaultPath, Stats};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::{Registry, Unit};

use crate::api::{SourceFigures, SourceState, State, Status};

/// The media type of the text.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Bounds of the latencies, in microseconds: from a page that was only unpublished to a source that
/// is away for minutes.
const BOUNDS_US: [u64; 20] = [
    5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000,
    500_000, 1_000_000, 5_000_000, 20_000_000, 60_000_000,
];

/// All counters of this text: none has an example of what it counted.
const NO_EXAMPLE: Option<&Exemplar<NoLabelSet, u64>> = None;

/// Returns the figures of a VM as OpenMetrics text. Without statistics, as before there is a VM,
/// these are the ones of its status.
pub(crate) fn text(
    status: Status,
    stats: Option<Arc<Stats>>,
    sources: SourceFigures,
) -> Result<String, Error> {
    let mut registry = Registry::with_prefix("demand_vmm");
    registry.register_collector(Box::new(Figures { status, stats, sources }));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// The labels of a family with one metric.
type NoLabels = [(&'static str, &'static str); 0];

/// Returns the value of a family without labels.
fn alone(value: u64) -> [(NoLabels, u64); 1] {
    [([], value)]
}

/// The figures at one moment.
#[derive(Debug)]
struct Figures {
    status: Status,
    stats: Option<Arc<Stats>>,
    sources: SourceFigures,
}

impl Collector for Figures {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut families = Families(encoder);
        self.add_status(&mut families)?;
        self.stats.as_ref().map_or(Ok(()), |stats| add_stats(&mut families, stats))?;
        add_sources(&mut families, &self.sources)
    }
}

impl Figures {
    fn add_status(&self, families: &mut Families<'_>) -> Result<(), Error> {
        let status = &self.status;
        families.info(
            "vm",
            "The VM's fixed properties",
            &[
                ("engine", status.engine.as_str()),
                ("backing", status.backing.as_str()),
                ("version", status.version.as_str()),
            ],
        )?;
        let states = State::ALL.map(|state| {
            let name = state.to_string();
            ([("state", name)], u64::from(state == status.state))
        });
        families.gauges("state", "1 for the VM's state, 0 for the others", None, &states)?;
        families.gauges("vcpus", "vCPUs", None, &alone(status.cpus.into()))?;
        let bytes = Some(&Unit::Bytes);
        families.gauges("memory", "Size of the memory", bytes, &alone(status.memory_bytes))?;
        families.gauges("pages", "Pages of 4 KiB", None, &alone(status.pages_total))?;
        let present = alone(status.pages_present);
        families.gauges("present_pages", "Pages whose content has arrived", None, &present)?;
        let failing = alone(status.last_error.is_some().into());
        families.gauges(
            "failing",
            "1 while an error persists, as in the status",
            None,
            &failing,
        )?;
        let alive = status.devices.iter().map(|device| {
            let socket = device.socket.clone().unwrap_or_default();
            (
                [("type", device.kind.clone()), ("socket", socket)],
                u64::from(device.state == "alive"),
            )
        });
        let alive: Vec<_> = alive.collect();
        families.gauges(
            "back_end_alive",
            "1 for a back-end that serves its device",
            None,
            &alive,
        )?;
        let up = status.sources.iter().map(|source| {
            let name = [("source", source.source.clone())];
            (name, u64::from(source.state == SourceState::Healthy))
        });
        let up: Vec<_> = up.collect();
        if !up.is_empty() {
            families.gauges("source_healthy", "1 for a place that delivers", None, &up)?;
        }
        let uptime = Duration::from_micros(status.uptime_us).as_secs_f64();
        families.seconds("uptime", "Time since the process started", uptime)
    }
}

fn add_stats(families: &mut Families<'_>, stats: &Stats) -> Result<(), Error> {
    let paths = FaultPath::ALL.map(|path| ([("path", path.name().to_string())], stats.path(path)));
    let mut faults = Vec::new();
    for ([path], report) in &paths {
        for (bytes, count) in &report.granularity_histogram {
            faults.push(([path.clone(), ("mapped_bytes", bytes.to_string())], *count));
        }
    }
    let help = "Accesses to missing pages, by the bytes that each resolution mapped";
    families.counters("faults", help, None, &faults)?;
    let pages = paths.each_ref().map(|(path, report)| (path.clone(), report.pages));
    families.counters("arrived_pages", "Pages that became present", None, &pages)?;
    let bytes = paths.each_ref().map(|(path, report)| (path.clone(), report.bytes_fetched));
    let help = "Bytes read from the source; holes are not read";
    families.counters("fetched", help, Some(&Unit::Bytes), &bytes)?;
    let help = "Time from a fault's arrival to its resolution";
    families.latencies("fault", help, stats)?;
    let source = stats.source();
    families.counters("source_reads", "Reads of the source", None, &alone(source.reads))?;
    let help = "Attempts to read the source that failed";
    families.counters("source_errors", help, None, &alone(source.errors))?;
    let help = "Attempts to read the source after a failure";
    families.counters("source_retries", help, None, &alone(source.retries))
}

fn add_sources(families: &mut Families<'_>, sources: &SourceFigures) -> Result<(), Error> {
    let bytes = Some(&Unit::Bytes);
    if let Some(cache) = &sources.cache {
        let help = "Reads that the host cache answered";
        families.counters("cache_hits", help, None, &alone(cache.hits))?;
        let help = "Bytes that the host cache answered with";
        families.counters("cache_hit", help, bytes, &alone(cache.hit_bytes))?;
        let help = "Chunks that came from the store";
        families.counters("cache_misses", help, None, &alone(cache.misses))?;
        let help = "Bytes that were written to the host cache";
        families.counters("cache_written", help, bytes, &alone(cache.written_bytes))?;
    }
    let Some(remote) = &sources.remote else { return Ok(()) };
    let help = "Requests to stores that were answered";
    families.counters("remote_requests", help, None, &alone(remote.requests))?;
    let help = "Bytes of the answers of stores";
    families.counters("remote_answer", help, bytes, &alone(remote.bytes))?;
    let help = "Requests for faults that were made twice, because they were late";
    families.counters("hedges", help, None, &alone(remote.hedges))?;
    let help = "Second requests that were answered first";
    families.counters("hedges_won", help, None, &alone(remote.hedges_won))?;
    let help = "Pages fetched beside those that faults needed";
    families.counters("around_pages", help, None, &alone(remote.around_pages))?;
    let help = "Pages fetched beside faults that were read later";
    families.counters("around_used_pages", help, None, &alone(remote.around_used_pages))?;
    let queues = [("demand", remote.demand_queue), ("fill", remote.fill_queue)];
    let queues = queues.map(|(priority, len)| ([("priority", priority)], len));
    let help = "Requests to stores that are in progress or queued";
    families.gauges("remote_queue", help, None, &queues)
}

/// Writes families of metrics.
struct Families<'a>(DescriptorEncoder<'a>);

impl Families<'_> {
    fn info(&mut self, name: &str, help: &str, labels: &[(&str, &str)]) -> Result<(), Error> {
        self.0.encode_descriptor(name, help, None, MetricType::Info)?.encode_info(&labels)
    }

    fn seconds(&mut self, name: &str, help: &str, value: f64) -> Result<(), Error> {
        let unit = Some(&Unit::Seconds);
        self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?.encode_gauge(&value)
    }

    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        values: &[(impl EncodeLabelSet, u64)],
    ) -> Result<(), Error> {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        values
            .iter()
            .try_for_each(|(labels, value)| family.encode_family(labels)?.encode_gauge(value))
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        values: &[(impl EncodeLabelSet, u64)],
    ) -> Result<(), Error> {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        values.iter().try_for_each(|(labels, value)| {
            family.encode_family(labels)?.encode_counter(value, NO_EXAMPLE)
        })
    }

    /// Writes the latencies of each path that has faults.
    fn latencies(&mut self, name: &str, help: &str, stats: &Stats) -> Result<(), Error> {
        let unit = Some(&Unit::Seconds);
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Histogram)?;
        let bounds = BOUNDS_US.map(Duration::from_micros);
        let upper = bounds.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]);
        for path in FaultPath::ALL {
            let latencies = stats.latencies(path, &bounds);
            let count = latencies.counts.iter().sum();
            if count == 0 {
                continue;
            }
            let buckets: Vec<_> = upper.clone().zip(latencies.counts).collect();
            let total = latencies.total.as_secs_f64();
            let no_examples = None::<&std::collections::HashMap<usize, Exemplar<NoLabelSet, f64>>>;
            family.encode_family(&[("path", path.name())])?.encode_histogram(
                total,
                count,
                &buckets,
                no_examples,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{DeviceStatus, SourceStatus};
    use crate::report::{CacheReport, RemoteReport};

    fn status() -> Status {
        Status {
            state: State::Running,
            engine: "uffd".into(),
            backing: "hugetlb-2m".into(),
            memory_bytes: 4 << 20,
            cpus: 2,
            pages_total: 1024,
            pages_present: 513,
            devices: vec![DeviceStatus {
                kind: "blk".into(),
                socket: Some("/run/a \"b\"".into()),
                state: "gone".into(),
            }],
            uptime_us: 1_500_000,
            pid: 1,
            version: "0.1.0".into(),
            guest: None,
            snapshot: None,
            last_error: None,
            sources: vec![SourceStatus {
                source: "s3://a/vm7".into(),
                state: SourceState::Failing,
                failing_s: Some(3),
                failures: 2,
            }],
            limits: Vec::new(),
            working_set: None,
        }
    }

    #[test]
    fn figures_are_written_with_their_units() {
        let stats = Arc::new(Stats::new());
        for micros in [7, 90, 3_000] {
            stats.fault(FaultPath::Guest, 4096, Duration::from_micros(micros));
        }
        stats.fault(FaultPath::BackEnd, 2 << 20, Duration::from_secs(100));
        let cache = Some(CacheReport { hits: 7, hit_bytes: 28_672, ..Default::default() });
        let remote = RemoteReport { requests: 5, hedges: 1, fill_queue: 2, ..Default::default() };
        let sources = SourceFigures { cache, remote: Some(remote) };
        let text = text(status(), Some(stats), sources).unwrap();
        for line in [
            "demand_vmm_vm_info{engine=\"uffd\",backing=\"hugetlb-2m\",version=\"0.1.0\"} 1",
            "demand_vmm_state{state=\"running\"} 1",
            "demand_vmm_state{state=\"paused\"} 0",
            "demand_vmm_memory_bytes 4194304",
            "demand_vmm_pages 1024",
            "demand_vmm_present_pages 513",
            "demand_vmm_failing 0",
            "demand_vmm_back_end_alive{type=\"blk\",socket=\"/run/a \\\"b\\\"\"} 0",
            "demand_vmm_uptime_seconds 1.5",
            "# TYPE demand_vmm_faults counter",
            "demand_vmm_faults_total{path=\"guest\",mapped_bytes=\"4096\"} 3",
            "demand_vmm_faults_total{path=\"back_end\",mapped_bytes=\"2097152\"} 1",
            "demand_vmm_fetched_bytes_total{path=\"fill\"} 0",
            "# UNIT demand_vmm_fault_seconds seconds",
            "demand_vmm_fault_seconds_count{path=\"guest\"} 3",
            "demand_vmm_fault_seconds_bucket{le=\"0.000005\",path=\"guest\"} 0",
            "demand_vmm_fault_seconds_bucket{le=\"0.00001\",path=\"guest\"} 1",
            "demand_vmm_fault_seconds_bucket{le=\"0.0001\",path=\"guest\"} 2",
            "demand_vmm_fault_seconds_bucket{le=\"0.005\",path=\"guest\"} 3",
            "demand_vmm_fault_seconds_bucket{le=\"60.0\",path=\"back_end\"} 0",
            "demand_vmm_fault_seconds_bucket{le=\"+Inf\",path=\"back_end\"} 1",
            "demand_vmm_source_reads_total 0",
            "demand_vmm_source_healthy{source=\"s3://a/vm7\"} 0",
            "demand_vmm_cache_hits_total 7",
            "demand_vmm_cache_hit_bytes_total 28672",
            "demand_vmm_remote_requests_total 5",
            "demand_vmm_hedges_total 1",
            "demand_vmm_remote_queue{priority=\"fill\"} 2",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("path=\"vmm\",le") && text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn figures_of_no_vm_are_its_status() {
        let text = text(Status { devices: Vec::new(), ..status() }, None, SourceFigures::default())
            .unwrap();
        assert!(text.contains("demand_vmm_present_pages 513"), "{text}");
        assert!(!text.contains("faults") && !text.contains("remote"), "{text}");
    }
}
