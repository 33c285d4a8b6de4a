use proptest::prelude::*;

use super::*;

fn id(text: &str) -> Id {
    text.parse().unwrap()
}

fn init(container: &str) -> ProcessId {
    ProcessId::init(id(container))
}

fn exec(container: &str, exec: &str) -> ProcessId {
    ProcessId::exec(id(container), id(exec))
}

fn exit(status: u8) -> Exit {
    Exit { status, oom_kills: 0, at: SystemTime::UNIX_EPOCH, death: None }
}

/// "created c", "exited c/e 137": what is told, in short.
fn told(events: &[Event]) -> Vec<String> {
    let name = |p: &ProcessId| match &p.exec {
        Some(exec) => format!("{}/{exec}", p.container),
        None => p.container.to_string(),
    };
    let short = |event: &Event| match event {
        Event::Created { process, .. } => format!("created {}", name(process)),
        Event::Started { process, .. } => format!("started {}", name(process)),
        Event::Exited { process, exit, .. } => format!("exited {} {}", name(process), exit.status),
        Event::Deleted { process } => format!("deleted {}", name(process)),
        Event::Oom { container } => format!("oom {container}"),
        other => format!("{other:?}"),
    };
    events.iter().map(short).collect()
}

fn running(table: &mut Table, process: &ProcessId) {
    table.create(process).unwrap();
    table.created(process, 7);
    table.start(process).unwrap();
    table.started(process);
}

#[test]
fn a_life_is_told_in_order() {
    let (mut table, c) = (Table::default(), init("c"));
    table.create(&c).unwrap();
    let mut events = table.created(&c, 7);
    table.start(&c).unwrap();
    events.extend(table.started(&c));
    assert_eq!(table.exit(&c), Ok(None));
    events.extend(table.exited(&c, exit(3)));
    assert_eq!(table.exit(&c), Ok(Some(exit(3))));
    table.delete(&c).unwrap();
    events.extend(table.deleted(&c));
    assert_eq!(told(&events), ["created c", "started c", "exited c 3", "deleted c"]);
    assert_eq!(table.exit(&c), Err(Refused::NotFound(c)));
}

#[test]
fn what_is_out_of_order_is_refused() {
    let (mut table, c) = (Table::default(), init("c"));
    assert!(matches!(table.start(&c), Err(Refused::NotFound(_))));
    assert!(matches!(table.create(&exec("c", "e")), Err(Refused::NotFound(_))));
    table.create(&c).unwrap();
    assert!(matches!(table.create(&c), Err(Refused::Exists(_))));
    assert!(matches!(table.start(&c), Err(Refused::State { .. })));
    assert!(matches!(table.create(&exec("c", "e")), Err(Refused::State { .. })));
    table.created(&c, 7);
    table.start(&c).unwrap();
    assert!(matches!(table.start(&c), Err(Refused::State { .. })));
    assert!(matches!(table.delete(&c), Err(Refused::State { .. })));
    table.started(&c);
    table.exited(&c, exit(0));
    assert!(matches!(table.create(&exec("c", "e")), Err(Refused::State { .. })));
    assert!(matches!(table.start(&c), Err(Refused::State { .. })));
}

#[test]
fn an_end_that_races_the_start_comes_after_it() {
    let (mut table, c) = (Table::default(), init("c"));
    table.create(&c).unwrap();
    table.created(&c, 7);
    table.start(&c).unwrap();
    assert!(table.exited(&c, exit(0)).is_empty());
    assert_eq!(told(&table.started(&c)), ["started c", "exited c 0"]);
}

#[test]
fn an_init_ends_after_its_execs() {
    let (mut table, c, e) = (Table::default(), init("c"), exec("c", "e"));
    running(&mut table, &c);
    running(&mut table, &e);
    let oom = Exit { oom_kills: 1, ..exit(137) };
    assert!(table.exited(&c, oom).is_empty());
    assert!(table.is_held(&id("c")));
    assert_eq!(told(&table.exited(&e, exit(137))), ["exited c/e 137", "oom c", "exited c 137"]);
    assert!(!table.is_held(&id("c")));
}

#[test]
fn each_kill_for_memory_is_told_once_and_before_the_end_it_causes() {
    let (mut table, c, e) = (Table::default(), init("c"), exec("c", "e"));
    assert!(table.oom(&id("c"), 1).is_empty());
    running(&mut table, &c);
    running(&mut table, &e);
    assert_eq!(told(&table.oom(&id("c"), 1)), ["oom c"]);
    assert!(table.oom(&id("c"), 1).is_empty());
    let end = |kills| Exit { oom_kills: kills, ..exit(137) };
    assert_eq!(told(&table.exited(&e, end(2))), ["oom c", "exited c/e 137"]);
    assert!(table.oom(&id("c"), 2).is_empty());
    assert_eq!(told(&table.exited(&c, end(2))), ["exited c 137"]);
    assert!(table.oom(&id("c"), 3).is_empty());
}

#[test]
fn execs_that_do_not_end_are_given_up() {
    let (mut table, c) = (Table::default(), init("c"));
    running(&mut table, &c);
    running(&mut table, &exec("c", "e"));
    assert!(table.give_up_execs(&id("c"), SystemTime::UNIX_EPOCH).is_empty());
    table.exited(&c, exit(0));
    let events = table.give_up_execs(&id("c"), SystemTime::UNIX_EPOCH);
    assert_eq!(told(&events), ["exited c/e 137", "exited c 0"]);
    assert!(table.exited(&exec("c", "e"), exit(1)).is_empty());
}

#[test]
fn a_dead_vm_ends_everything_with_137_once() {
    let mut table = Table::default();
    running(&mut table, &init("a"));
    running(&mut table, &exec("a", "e"));
    running(&mut table, &init("b"));
    table.exited(&init("b"), exit(5));
    table.create(&init("c")).unwrap();
    table.create(&init("d")).unwrap();
    table.created(&init("d"), 9);
    table.start(&init("d")).unwrap();
    let death = Arc::new(Death::lost());
    let events = table.ended(&death, SystemTime::UNIX_EPOCH);
    assert_eq!(told(&events), ["exited a/e 137", "exited a 137", "exited d 137"]);
    assert_eq!(table.exit(&init("a")).unwrap().unwrap().death, Some(death.clone()));
    assert_eq!(table.exit(&init("b")), Ok(Some(exit(5))));
    assert!(table.ended(&death, SystemTime::UNIX_EPOCH).is_empty());
    // Answers that were under way change nothing any more.
    assert!(table.started(&init("d")).is_empty());
    assert!(table.created(&init("c"), 3).is_empty());
}

#[test]
fn a_container_takes_its_execs_along() {
    let (mut table, c) = (Table::default(), init("c"));
    running(&mut table, &c);
    running(&mut table, &exec("c", "e"));
    table.exited(&exec("c", "e"), exit(0));
    assert!(matches!(table.delete(&c), Err(Refused::State { .. })));
    table.exited(&c, exit(0));
    table.delete(&c).unwrap();
    assert_eq!(told(&table.deleted(&c)), ["deleted c/e", "deleted c"]);
}

#[test]
fn a_workload_that_does_not_start_has_ended() {
    let (mut table, c) = (Table::default(), init("c"));
    table.create(&c).unwrap();
    table.created(&c, 7);
    table.start(&c).unwrap();
    assert_eq!(told(&table.start_failed(&c, exit(127))), ["exited c 127"]);
    assert!(table.exited(&c, exit(1)).is_empty());
    table.delete(&c).unwrap();
}

/// Anything that can happen to a container `c` and two execs.
#[derive(Clone, Debug)]
enum Step {
    Create(usize),
    Created(usize),
    Start(usize),
    Started(usize),
    StartFailed(usize),
    Exited(usize, u8),
    GiveUp,
    Ended,
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..3_usize;
    prop_oneof![
        3 => which.clone().prop_map(Step::Create),
        3 => which.clone().prop_map(Step::Created),
        3 => which.clone().prop_map(Step::Start),
        3 => which.clone().prop_map(Step::Started),
        1 => which.clone().prop_map(Step::StartFailed),
        3 => (which, any::<u8>()).prop_map(|(i, s)| Step::Exited(i, s)),
        1 => Just(Step::GiveUp),
        1 => Just(Step::Ended),
    ]
}

fn apply(table: &mut Table, step: &Step) -> Vec<Event> {
    let processes = [init("c"), exec("c", "e1"), exec("c", "e2")];
    match step {
        Step::Create(i) => {
            let _ = table.create(&processes[*i]);
            Vec::new()
        }
        Step::Created(i) => table.created(&processes[*i], 7),
        Step::Start(i) => {
            let _ = table.start(&processes[*i]);
            Vec::new()
        }
        Step::Started(i) => table.started(&processes[*i]),
        Step::StartFailed(i) => table.start_failed(&processes[*i], exit(127)),
        Step::Exited(i, status) => table.exited(&processes[*i], exit(*status)),
        Step::GiveUp => table.give_up_execs(&id("c"), SystemTime::UNIX_EPOCH),
        Step::Ended => table.ended(&Arc::new(Death::lost()), SystemTime::UNIX_EPOCH),
    }
}

proptest! {
    #[test]
    fn whatever_happens_the_order_holds(steps in proptest::collection::vec(step(), 0..80)) {
        let mut table = Table::default();
        let mut events = Vec::new();
        for step in &steps {
            events.extend(apply(&mut table, step));
        }
        events.extend(apply(&mut table, &Step::Ended));
        let told = told(&events);
        let at = |text: &str| told.iter().position(|t| t.starts_with(text));
        for name in ["c", "c/e1", "c/e2"] {
            let ends = told.iter().filter(|t| t.starts_with(&format!("exited {name} "))).count();
            let created = at(&format!("created {name}")).filter(|i| told[*i] == format!("created {name}"));
            prop_assert_eq!(ends, usize::from(told.contains(&format!("created {name}"))), "{:?}", told);
            let exited = at(&format!("exited {name} "));
            prop_assert!(created.is_none() || created < exited, "{:?}", told);
            let started = told.iter().position(|t| *t == format!("started {name}"));
            prop_assert!(started.is_none() || (created < started && started < exited), "{:?}", told);
        }
        for name in ["c/e1", "c/e2"] {
            let exited = at(&format!("exited {name} "));
            prop_assert!(exited.is_none() || exited < at("exited c "), "{:?}", told);
        }
    }
}
