// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Intact states that are impossible for any VM, or on this host.

use demand_tests::refusal::{FAILED, HOST, Refusals, USAGE};
use serde_json::{Value, json};

use crate::snapshot::{MEMORY, Snapshot, blk, restore_with};

/// An edit of a state: description, edit, exit status, words of the error.
type Case = (&'static str, fn(&mut Value), i32, &'static [&'static str]);

/// The state is impossible for a snapshot.
const MACHINE: &[Case] = &[
    ("no vCPU", |s| s["vcpus"] = json!([]), FAILED, &["0 vCPUs", "1 to 16", "use another"]),
    (
        "17 vCPUs",
        |s| s["vcpus"] = Value::Array(vec![s["vcpus"][0].clone(); 17]),
        FAILED,
        &["17 vCPUs", "1 to 16"],
    ),
    (
        "1000 vCPUs",
        |s| s["vcpus"] = Value::Array(vec![s["vcpus"][0].clone(); 1000]),
        FAILED,
        &["1000 vCPUs", "1 to 16"],
    ),
    (
        "a petabyte",
        |s| s["memory"]["size"] = json!(1u64 << 50),
        FAILED,
        &["from different snapshots"],
    ),
    (
        "all addresses",
        |s| s["memory"]["size"] = json!(u64::MAX - 4095),
        FAILED,
        &["from different snapshots"],
    ),
    ("no memory", |s| s["memory"]["size"] = json!(0), FAILED, &["snapshot", "size=0"]),
    ("half a page", |s| s["memory"]["size"] = json!(2048), FAILED, &["snapshot", "size=2048"]),
    (
        "a page more",
        |s| s["memory"]["size"] = json!(MEMORY + 4096),
        FAILED,
        &["from different snapshots"],
    ),
    ("less than no memory", |s| s["memory"]["size"] = json!(-1), FAILED, &["at memory.size"]),
    (
        "another generation",
        |s| s["memory"]["generation"] = json!("00".repeat(16)),
        FAILED,
        &["from different snapshots"],
    ),
    (
        "a long generation",
        |s| s["memory"]["generation"] = json!("00".repeat(17)),
        FAILED,
        &["from different snapshots"],
    ),
    (
        "memory of paper",
        |s| s["memory"]["backing"] = json!("paper"),
        FAILED,
        &["the snapshot's memory", "paper"],
    ),
    (
        "huge pages of huge pages",
        |s| {
            s["memory"]["backing"] = json!("hugetlb-1g");
            s["memory"]["thp"] = json!(true);
        },
        FAILED,
        &["snapshot", "multiple"],
    ),
    ("a field more", |s| s["moon"] = json!(1), FAILED, &["moon", "is complete, but not"]),
    ("a field less", |s| drop(s.as_object_mut().unwrap().remove("vm")), FAILED, &["vm"]),
    (
        "a serial port full of input",
        |s| s["serial"]["in_buffer"] = json!(vec![7; 10_000]),
        FAILED,
        &["serial port", "use another"],
    ),
];

/// The disk's state is impossible for a disk, or unusable with this back-end.
const DEVICE: &[Case] = &[
    ("another kind", |s| device(s)["kind"] = json!("rng"), FAILED, &["of kind rng"]),
    ("an unknown kind", |s| device(s)["kind"] = json!("gpu"), FAILED, &["devices[0].kind"]),
    ("no device", |s| s["devices"] = json!([]), USAGE, &["1 devices", "has none"]),
    (
        "a name of a million letters",
        |s| device(s)["name"] = json!("A".repeat(1 << 20)),
        FAILED,
        &["device blk0", "damaged"],
    ),
    ("a name of two lines", |s| device(s)["name"] = json!("a\n\u{1b}[2J"), FAILED, &["damaged"]),
    ("a device of another type", |s| registers(s)["device_id"] = json!(1), FAILED, &["damaged"]),
    ("no queues", |s| registers(s)["queues"] = json!([]), FAILED, &["damaged"]),
    (
        "300 queues",
        |s| {
            let queue = queue(s).clone();
            registers(s)["queues"] = Value::Array(vec![queue; 300]);
        },
        FAILED,
        &["damaged"],
    ),
    (
        "more queues than the back-end serves",
        |s| {
            let queue = queue(s).clone();
            registers(s)["queues"] = Value::Array(vec![queue; 3]);
        },
        FAILED,
        &["it needs 3 queues", "has 2"],
    ),
    ("half a configuration", |s| registers(s)["config"] = json!([1, 2, 3]), FAILED, &["damaged"]),
    (
        "features of another world",
        |s| registers(s)["driver_features"] = json!(u64::MAX),
        FAILED,
        &["does not fit a device of kind blk", "damaged"],
    ),
    ("a queue of no size", |s| queue(s)["size"] = json!(0), FAILED, &["queue 0", "damaged"]),
    ("a queue of a strange size", |s| queue(s)["size"] = json!(3), FAILED, &["queue 0", "damaged"]),
    ("a queue too large", |s| queue(s)["size"] = json!(65535), FAILED, &["damaged"]),
    (
        "queues larger than all",
        |s| {
            registers(s)["queue_size_max"] = json!(65535);
            queue(s)["size"] = json!(65535);
        },
        FAILED,
        &["damaged"],
    ),
    ("a queue of 70000", |s| queue(s)["size"] = json!(70000), FAILED, &["queues[0].size"]),
    ("descriptors outside", |s| queue(s)["descriptors"] = json!(1u64 << 40), FAILED, OUTSIDE),
    ("descriptors at the end", |s| queue(s)["descriptors"] = json!(MEMORY - 16), FAILED, OUTSIDE),
    (
        "descriptors at the end of all",
        |s| queue(s)["descriptors"] = json!(u64::MAX - 15),
        FAILED,
        OUTSIDE,
    ),
    ("requests outside", |s| queue(s)["available"] = json!(MEMORY), FAILED, OUTSIDE),
    ("answers in a device", |s| queue(s)["used"] = json!(0xd000_0000u64), FAILED, OUTSIDE),
    ("an odd ring", |s| queue(s)["available"] = json!(0x1001), FAILED, &["queue 0", "aligned"]),
];

/// The words of the error for rings outside memory.
const OUTSIDE: &[&str] = &["device blk0", "queue 0", "outside of guest memory", "damaged"];

/// The CPU's state is one that this KVM refuses.
const PROCESSOR: &[Case] = &[
    ("another vendor", |s| leaf(s, 0)[4] = json!(0x6c69_7645), HOST, &["vendor", "Evil"]),
    ("another family", |s| leaf(s, 1)[3] = json!(0x0fff_0f00), HOST, &["family"]),
    (
        "features that no processor has",
        |s| leaf(s, 1)[5] = json!(u32::MAX),
        HOST,
        &["CPUID leaf 0x1, subleaf 0, ECX, bits", "restore on a host that has them"],
    ),
    ("no CPUID", |s| vcpu(s)["cpuid"] = json!([]), HOST, &["vendor"]),
    (
        "300 leaves",
        |s| {
            let leaf = leaf(s, 0).clone();
            vcpu(s)["cpuid"] = Value::Array(vec![leaf; 300]);
        },
        FAILED,
        &["300 leaves", "damaged"],
    ),
    (
        "half of the registers",
        |s| {
            let half = vcpu(s)["regs"].as_str().unwrap().len() / 2;
            vcpu(s)["regs"] = json!(vcpu(s)["regs"].as_str().unwrap()[..half]);
        },
        FAILED,
        &["vcpus[0].regs"],
    ),
    ("registers that are no numbers", |s| vcpu(s)["regs"] = json!("xyz"), FAILED, &["regs"]),
    (
        "system registers of ones",
        |s| {
            let len = vcpu(s)["sregs"].as_str().unwrap().len();
            vcpu(s)["sregs"] = json!("f".repeat(len));
        },
        HOST,
        &["vCPU 0", "its system registers"],
    ),
    ("no FPU", |s| vcpu(s)["xsave"] = json!(""), FAILED, &["its FPU state", "0 bytes"]),
    ("half an FPU", |s| cut(&mut vcpu(s)["xsave"], 2000), FAILED, &["FPU state", "1000 bytes"]),
    (
        "a larger FPU",
        |s| {
            let text = vcpu(s)["xsave"].as_str().unwrap().to_owned();
            vcpu(s)["xsave"] = json!(text + &"01".repeat(1 << 16));
        },
        HOST,
        &["its FPU state", "bytes"],
    ),
    (
        "an unknown register",
        |s| msrs(s).push(json!([0xdead_beefu32, 1])),
        HOST,
        &["vCPU 0", "MSR 0xdeadbeef"],
    ),
    (
        "a strange mode",
        |s| vcpu(s)["mp_state"] = json!("4d000000"),
        HOST,
        &["vCPU 0", "its MP state"],
    ),
    (
        "an interrupt controller that there is not",
        |s| replace(&mut s["vm"]["pic_master"], 0, "09"),
        HOST,
        &["interrupt controller"],
    ),
];

fn device(state: &mut Value) -> &mut Value {
    &mut state["devices"][0]
}

fn registers(state: &mut Value) -> &mut Value {
    &mut device(state)["registers"]
}

fn queue(state: &mut Value) -> &mut Value {
    &mut registers(state)["queues"][0]
}

fn vcpu(state: &mut Value) -> &mut Value {
    &mut state["vcpus"][0]
}

fn msrs(state: &mut Value) -> &mut Vec<Value> {
    vcpu(state)["msrs"].as_array_mut().unwrap()
}

/// Returns the first leaf with this number: leaf, subleaf, flags, and four registers.
fn leaf(state: &mut Value, number: u32) -> &mut Value {
    let leaves = vcpu(state)["cpuid"].as_array_mut().unwrap();
    leaves.iter_mut().find(|leaf| leaf[0] == number).unwrap()
}

/// Truncates a text.
fn cut(text: &mut Value, len: usize) {
    *text = json!(text.as_str().unwrap()[..len]);
}

/// Replaces a part of a text.
fn replace(text: &mut Value, at: usize, part: &str) {
    let mut long = text.as_str().unwrap().to_owned();
    long.replace_range(at..at + part.len(), part);
    *text = json!(long);
}

fn all_are_refused(cases: &[Case]) {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let back_end = snapshot.back_end(folder.path(), &blk());
    let mut refusals = Refusals::new();
    for (case, edit, status, words) in cases {
        let copy = snapshot.edited(edit);
        let mut command = restore_with(&copy.dir(), back_end.socket());
        let api = folder.path().join("api.sock");
        command.args(["--fill", "off", "--api-socket"]).arg(&api);
        refusals.check(case, &mut command, *status, words);
        if api.exists() {
            refusals.wrong(case, "the API's socket is left");
            std::fs::remove_file(&api).unwrap();
        }
    }
    refusals.end();
    snapshot.assert_unchanged();
    // The back-end has survived all cases.
    assert!(back_end.accepts());
}

#[test]
fn impossible_machines_are_refused() {
    all_are_refused(MACHINE);
}

#[test]
fn impossible_devices_are_refused() {
    all_are_refused(DEVICE);
}

#[test]
fn impossible_processors_are_refused() {
    all_are_refused(PROCESSOR);
}
