//! What the guest's CPUID says: what KVM supports, less what a guest must not have, with the topology of one
//! package of single-threaded cores.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use vmm_sys_util::errno;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES: u32 = 0x4;
const LEAF_POWER: u32 = 0x6;
const LEAF_STRUCTURED_FEATURES: u32 = 0x7;
const LEAF_PMU: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_EXTENDED_FEATURES: u32 = 0x8000_0001;
const LEAF_SIZES: u32 = 0x8000_0008;
const LEAF_SVM: u32 = 0x8000_000a;
const LEAF_CACHES_AMD: u32 = 0x8000_001d;
const LEAF_TOPOLOGY_AMD: u32 = 0x8000_001e;
const LEAF_PMU_AMD: u32 = 0x8000_0022;

// Leaf 1, ECX.
const VMX: u32 = 1 << 5;
const SMX: u32 = 1 << 6;
const PDCM: u32 = 1 << 15;
const TSC_DEADLINE: u32 = 1 << 24;
const RDRAND: u32 = 1 << 30;
const HYPERVISOR: u32 = 1 << 31;
// Leaf 1, EDX.
const HTT: u32 = 1 << 28;
// Leaf 6.
const ARAT: u32 = 1 << 2;
const ENERGY_BIAS: u32 = 1 << 3;
// Leaf 7, EBX.
const RDSEED: u32 = 1 << 18;
// Leaf 0x8000_0001, ECX.
const SVM: u32 = 1 << 2;
const PERFCTR_CORE: u32 = 1 << 23;
const PERFCTR_NB: u32 = 1 << 24;
const PERFCTR_LLC: u32 = 1 << 28;

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Asks KVM once (0.3 ms); [`for_vcpu`] makes each vCPU's from it.
pub fn supported(kvm: &Kvm) -> Result<CpuId, errno::Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
}

/// Takes RDRAND and RDSEED out. Where KVM can, it then makes the instructions fault as well.
pub fn hide_random(cpuid: &mut CpuId) {
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (LEAF_FEATURES, _) => entry.ecx &= !RDRAND,
            (LEAF_STRUCTURED_FEATURES, 0) => entry.ebx &= !RDSEED,
            _ => {}
        }
    }
}

/// The table of vCPU `id` of `vcpus`. KVM's own leaves (0x4000_0000…: kvm-clock, paravirtual spinlocks) stay.
pub fn for_vcpu(supported: &CpuId, id: u8, vcpus: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let topology = Topology { id: id.into(), vcpus: vcpus.into() };
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|e| !matches!(e.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2))
        .map(|e| topology.adapt(*e))
        .collect();
    let max = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    for leaf in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2].into_iter().filter(|&leaf| leaf <= max) {
        entries.extend(topology.levels(leaf));
    }
    CpuId::from_entries(&entries)
}

struct Topology {
    id: u32,
    vcpus: u32,
}

impl Topology {
    /// Bits of an APIC id that number the cores.
    fn core_bits(&self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }

    fn adapt(&self, mut e: kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
        match e.function {
            LEAF_FEATURES => {
                let cores = self.vcpus.next_power_of_two();
                e.ebx = e.ebx & 0x0000_ffff | cores << 16 | self.id << 24;
                e.ecx = e.ecx & !(VMX | SMX | PDCM) | TSC_DEADLINE | HYPERVISOR;
                e.edx = if self.vcpus > 1 { e.edx | HTT } else { e.edx & !HTT };
            }
            // EAX 25:14 is how many threads share the cache, less 1; 31:26 the cores of the package, less 1.
            LEAF_CACHES if e.eax & 0x1f != 0 => {
                let level = (e.eax >> 5) & 0x7;
                let shared = if level >= 3 { self.vcpus - 1 } else { 0 };
                e.eax = e.eax & 0x3fff | shared << 14 | (self.vcpus - 1) << 26;
            }
            LEAF_CACHES_AMD if e.eax & 0x1f != 0 => {
                let level = (e.eax >> 5) & 0x7;
                let shared = if level >= 3 { self.vcpus - 1 } else { 0 };
                e.eax = e.eax & 0x3fff | shared << 14;
            }
            LEAF_POWER => {
                e.eax = ARAT;
                e.ecx &= !ENERGY_BIAS;
            }
            LEAF_PMU | LEAF_PMU_AMD | LEAF_SVM => clear(&mut e),
            LEAF_EXTENDED_FEATURES => e.ecx &= !(SVM | PERFCTR_CORE | PERFCTR_NB | PERFCTR_LLC),
            LEAF_SIZES => e.ecx = self.core_bits() << 12 | (self.vcpus - 1),
            LEAF_TOPOLOGY_AMD => (e.eax, e.ebx, e.ecx) = (self.id, self.id, 0),
            _ => {}
        }
        e
    }

    /// Leaves 0xb and 0x1f: a level of threads (one per core), a level of cores, the end.
    fn levels(&self, leaf: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
            function: leaf,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index,
            edx: self.id,
            ..Default::default()
        };
        [
            level(0, LEVEL_THREAD, 0, 1),
            level(1, LEVEL_CORE, self.core_bits(), self.vcpus),
            level(2, 0, 0, 0),
        ]
    }
}

fn clear(e: &mut kvm_cpuid_entry2) {
    (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> CpuId {
        let all = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let mut entries = vec![kvm_cpuid_entry2 { eax: 0x1f, ..Default::default() }];
        entries.extend([1, 4, 6, 7, 0xa, 0xb, 0x1f, 0x4000_0001].map(|f| all(f, 0)));
        entries.extend([1, 8, 0xa, 0x1d, 0x1e, 0x22].map(|f| all(0x8000_0000 + f, 0)));
        CpuId::from_entries(&entries).unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found =
            cpuid.as_slice().iter().filter(|e| (e.function, e.index) == (function, index));
        let entry = *found.next().unwrap();
        assert!(found.next().is_none(), "{function:#x}.{index} appears twice");
        entry
    }

    #[test]
    fn nested_virtualization_and_counters_are_hidden() {
        let cpuid = for_vcpu(&host(), 0, 1).unwrap();
        assert_eq!(leaf(&cpuid, 1, 0).ecx & (VMX | SMX | PDCM), 0);
        assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx & SVM, 0);
        for hidden in [0xa, 0x8000_000a, 0x8000_0022] {
            let e = leaf(&cpuid, hidden, 0);
            assert_eq!((e.eax, e.ebx, e.ecx, e.edx), (0, 0, 0, 0), "{hidden:#x}");
        }
        assert_eq!(leaf(&cpuid, 0x4000_0001, 0).eax, u32::MAX);
    }

    #[test]
    fn random_numbers_of_the_processor_can_be_hidden() {
        let mut supported = host();
        hide_random(&mut supported);
        for (cpuid, hidden) in [(host(), false), (supported, true)] {
            let cpuid = for_vcpu(&cpuid, 0, 1).unwrap();
            assert_eq!(leaf(&cpuid, 1, 0).ecx & RDRAND == 0, hidden);
            assert_eq!(leaf(&cpuid, 7, 0).ebx & RDSEED == 0, hidden);
        }
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        for vcpus in 1..=16u8 {
            for id in 0..vcpus {
                let cpuid = for_vcpu(&host(), id, vcpus).unwrap();
                let id = u32::from(id);
                assert_eq!(leaf(&cpuid, 1, 0).ebx >> 24, id);
                assert_eq!(leaf(&cpuid, 0x8000_001e, 0).eax, id);
                for level in 0..3 {
                    assert_eq!(leaf(&cpuid, 0xb, level).edx, id);
                    assert_eq!(leaf(&cpuid, 0x1f, level).edx, id);
                }
                // Every id of the package fits into the bits said to number its cores.
                let cores = leaf(&cpuid, 0xb, 1);
                assert_eq!(cores.ebx, u32::from(vcpus));
                assert!(id >> cores.eax == 0);
                assert_eq!(leaf(&cpuid, 1, 0).edx & HTT != 0, vcpus > 1);
            }
        }
    }
}
