//! A /dev/kvm that runs guest kernels in software. `tests/run` starts this program on the machine itself, if it has one.

use ampoule_tests::run;

#[test]
fn an_emulated_kvm_is_suspected_by_name() {
    let out = run(["alpine", "true"]).output().ended_with(125);
    out.says(&["boot", "/dev/kvm", "this /dev/kvm may be emulated: see `ampoule check`"]);
}
