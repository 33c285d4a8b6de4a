//! Which process goes first when the host is out of memory (proc(5), oom_score_adj).

use std::fs;

/// A sandbox's processes go before the one that runs it, and long before containerd, whose score ours may be near.
pub fn set_score(pid: u32, score: i32) {
    let own = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    let own = own.trim().parse::<i32>().unwrap_or(0);
    if score <= own {
        return;
    }
    let path = format!("/proc/{pid}/oom_score_adj");
    if let Err(error) = fs::write(&path, score.to_string()) {
        tracing::warn!(path, %error, "a process of the sandbox keeps our own oom score");
    }
}
