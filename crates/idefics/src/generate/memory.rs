//! How much memory caches may take, and how it is divided.

use super::StepModel;

/// What is assumed where the system does not tell.
const UNKNOWN: usize = 4 << 30;

/// Less makes no sense: it would refuse most prompts.
const LEAST: usize = 64 << 20;

/// Limits on bytes of caches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    /// Keys, values and pictures of running requests, and all that is kept for later.
    pub bytes: usize,
    /// Most bytes of pictures that are kept for later.
    pub kept_image_bytes: usize,
    /// Most bytes of keys and values that are kept for later prompts that begin the same.
    pub kept_prefix_bytes: usize,
    /// Share of an answer's longest length that is counted when its request starts, from 0 to 1. With less than 1
    /// more requests run together; where their answers turn out long, the last ones to come step back for a while
    /// and read their tokens again.
    pub answer_share: f64,
    /// How often later requests may start before one that does not fit yet.
    pub overtakes: u32,
}

impl Memory {
    /// So many bytes, half of which may be kept for prompts that begin the same and a quarter for pictures.
    pub fn of(bytes: usize) -> Self {
        Self {
            bytes,
            kept_image_bytes: bytes / 4,
            kept_prefix_bytes: bytes / 2,
            answer_share: 0.5,
            overtakes: 8,
        }
    }

    /// Three quarters of the memory that is free beside the weights of `model`.
    pub fn available(model: &impl StepModel) -> Self {
        let free = available_bytes().unwrap_or(UNKNOWN);
        // Weights in a file are counted as free until they are read, and want to stay in memory then.
        Self::of((free.saturating_sub(model.weight_bytes()) / 4 * 3).max(free / 4).max(LEAST))
    }
}

/// Memory that a process can still get: of the machine, and of its control group; nothing where the system does not
/// tell.
pub fn available_bytes() -> Option<usize> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let machine = of_meminfo(&meminfo)?;
    let group = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let [max, current, stat] = ["memory.max", "memory.current", "memory.stat"].map(group);
    let left = left_in_group(max.as_deref(), current.as_deref(), stat.as_deref());
    Some(left.map_or(machine, |left| left.min(machine)))
}

fn of_meminfo(text: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What a control group has left, its page cache counted as free; none without a limit.
fn left_in_group(max: Option<&str>, current: Option<&str>, stat: Option<&str>) -> Option<usize> {
    let max: usize = max?.trim().parse().ok()?;
    let current: usize = current?.trim().parse().ok()?;
    let file = stat.and_then(|stat| stat.lines().find_map(|line| line.strip_prefix("file ")));
    let file: usize = file.and_then(|file| file.trim().parse().ok()).unwrap_or(0);
    Some(max.saturating_sub(current.saturating_sub(file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_s_memory_is_read() {
        let text = "MemTotal:       16384 kB\nMemFree:  100 kB\nMemAvailable:    8192 kB\n";
        assert_eq!(of_meminfo(text), Some(8 << 20));
        for text in ["", "MemAvailable: many kB", "MemAvailable: 7"] {
            assert_eq!(of_meminfo(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_control_group_limits_it() {
        let left = |max, current, stat| left_in_group(Some(max), Some(current), Some(stat));
        assert_eq!(left("1000\n", "700\n", "anon 300\nfile 400\n"), Some(700));
        assert_eq!(left("1000\n", "700\n", ""), Some(300));
        assert_eq!(left("100\n", "700\n", ""), Some(0));
        assert_eq!(left("max\n", "700\n", ""), None);
        assert_eq!(left_in_group(None, None, None), None);
    }
}
