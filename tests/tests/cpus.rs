//! VMs of several CPUs. A program of its own: four vCPUs on a bed of two are what it stands still over most.

use ampoule_tests::run;

#[test]
fn as_many_cpus_as_asked() {
    for cpus in ["1", "2", "4"] {
        let count = ["--cpus", cpus, "alpine", "--", "grep", "-c", "^processor", "/proc/cpuinfo"];
        assert_eq!(run(count).output().ended_with(0).text(), cpus);
    }
}
