// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Advice on how to change a host so that it supports more.

use std::os::unix::fs::MetadataExt;
use std::{fs, io};

use demand_kvm::{KvmError, Virtualization};
use demand_memory::{BackingKind, HugePagePool};
use demand_uffd::OpenError;
use serde::{Deserialize, Serialize};

/// Advice on a capability that the host could have but lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Advice {
    /// The capability that the host would gain.
    pub aim: String,
    /// The way to it: a command, or a replacement.
    pub step: String,
}

impl Advice {
    fn new(aim: &str, step: impl Into<String>) -> Self {
        Advice { aim: aim.into(), step: step.into() }
    }
}

/// Findings about a host.
#[derive(Debug)]
pub(crate) struct Found<'a> {
    pub(crate) kvm: &'a demand_kvm::Probe,
    pub(crate) userfaultfd: &'a Result<demand_uffd::Probe, OpenError>,
    /// The huge page pool of each kind of backing.
    pub(crate) pools: &'a [(BackingKind, Option<HugePagePool>)],
    /// Whether shared memory may use transparent huge pages.
    pub(crate) transparent: bool,
}

/// Returns the advice for a host. Steps without which no guest runs come first.
pub(crate) fn advice(found: &Found<'_>) -> Vec<Advice> {
    let kvm = of_kvm(found.kvm);
    let userfaultfd = of_userfaultfd(found.userfaultfd);
    let pools = found.pools.iter().filter_map(|(kind, pool)| of_pool(*kind, (*pool)?));
    let transparent = (!found.transparent).then(|| {
        Advice::new(
            "transparent huge pages for shared memory (thp=on)",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        )
    });
    kvm.into_iter().chain(userfaultfd).chain(pools).chain(transparent).collect()
}

fn of_kvm(probe: &demand_kvm::Probe) -> Vec<Advice> {
    const LINUX: &str = "Linux guests, and guests at the processor's speed";
    let features = match &probe.kvm {
        Ok(features) => features,
        Err(error) => {
            let step = match error {
                KvmError::Absent(_) => "modprobe kvm_intel || modprobe kvm_amd".into(),
                KvmError::Permission(_) if joins_at_login() => {
                    "log in again: the group that owns /dev/kvm has this user already".into()
                }
                KvmError::Permission(_) => "usermod -aG kvm $USER, and log in again".into(),
                // The remedy is the last part of the message.
                other => other.to_string().rsplit("; ").next().unwrap_or_default().to_owned(),
            };
            return vec![Advice::new("guests", step)];
        }
    };
    let mut advice = Vec::new();
    if probe.virtualization == Virtualization::Emulated {
        advice.push(Advice::new(
            LINUX,
            "use a machine with Intel VMX or AMD SVM; if it is virtual, enable nested \
             virtualization on its host",
        ));
    }
    if !features.userfault.works() {
        advice.push(Advice::new(
            "vCPUs that fault at 4K on huge pages as well",
            "use a kernel with KVM Userfault; rust-vmm-ci/kernel has the patches",
        ));
    } else if !features.own_accesses {
        advice.push(Advice::new(
            "KVM's own accesses at 4K on huge pages, and nested guests",
            "use a kernel whose KVM honours the bitmap in all its accesses; rust-vmm-ci/kernel \
             has the patches",
        ));
    }
    advice
}

/// Returns whether the group that owns `/dev/kvm` has this user, but not yet this process: a login
/// gives a process its groups.
fn joins_at_login() -> bool {
    let Ok(device) = fs::metadata("/dev/kvm") else { return false };
    let has = rustix::process::getgroups()
        .is_ok_and(|groups| groups.iter().any(|group| group.as_raw() == device.gid()));
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let me = rustix::process::getuid().as_raw();
    !has && is_member(&read("/etc/passwd"), &read("/etc/group"), me, device.gid())
}

/// Returns whether the user is a member of the group, by the contents of `/etc/passwd` and
/// `/etc/group`.
fn is_member(users: &str, groups: &str, user: u32, group: u32) -> bool {
    let (user, group) = (user.to_string(), group.to_string());
    let fields = |line: &str| line.split(':').map(String::from).collect::<Vec<_>>();
    let mut users = users.lines().map(fields);
    let Some(user) = users.find(|found| found.get(2) == Some(&user)) else { return false };
    let mut groups = groups.lines().map(fields).filter(|found| found.get(2) == Some(&group));
    groups.any(|found| {
        found.get(3).is_some_and(|members| members.split(',').any(|name| name == user[0]))
    })
}

fn of_userfaultfd(probe: &Result<demand_uffd::Probe, OpenError>) -> Vec<Advice> {
    let step = match probe {
        Ok(probe) => {
            let backings = [
                (BackingKind::Shmem, "guests on shared memory", "use Linux 5.14 or newer"),
                (BackingKind::Hugetlb2M, "guests on huge pages", "use Linux 5.13 or newer"),
            ];
            let lacking = backings.into_iter().filter(|(kind, ..)| !probe.can_page(*kind));
            return lacking.map(|(_, aim, step)| Advice::new(aim, step)).collect();
        }
        // `/dev/userfaultfd` exists since Linux 6.1.
        Err(OpenError::NotPermitted { device, .. }) if device.kind() == io::ErrorKind::NotFound => {
            "sysctl -w vm.unprivileged_userfaultfd=1"
        }
        Err(OpenError::NotPermitted { .. }) => {
            "chgrp kvm /dev/userfaultfd && chmod g+rw /dev/userfaultfd, and be in the group kvm; \
             contrib/udev has the rule that does so at each boot"
        }
        Err(OpenError::NoKernelSupport(_)) => "use a kernel built with CONFIG_USERFAULTFD",
        Err(_) => "raise the limit of open files: ulimit -n 65536",
    };
    vec![Advice::new("engine uffd, and back-ends that fault (post-copy)", step)]
}

fn of_pool(kind: BackingKind, pool: HugePagePool) -> Option<Advice> {
    if pool.free > 0 {
        return None;
    }
    // Enough pages for 1 GiB, in addition to those in use.
    let wanted = pool.total + (1 << 30) / kind.unit();
    match kind {
        BackingKind::Hugetlb2M => Some(Advice::new(
            "1G of memory on huge pages of 2M",
            format!("sysctl -w vm.nr_hugepages={wanted}"),
        )),
        BackingKind::Hugetlb1G => Some(Advice::new(
            "1G of memory on a huge page of 1G",
            format!(
                "echo {wanted} > /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages; if \
                 memory is in pieces, hugepagesz=1G hugepages={wanted} on the kernel's command line"
            ),
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use demand_kvm::{KvmFeatures, Probe, Trial};
    use demand_uffd::{Access, Answer, Features};

    fn uffd(answer: &Answer) -> demand_uffd::Probe {
        demand_uffd::Probe {
            access: Access::Device,
            features: Features::GUEST_MEMORY,
            missing_shmem: Answer::Yes,
            minor_shmem: answer.clone(),
            missing_hugetlbfs: Answer::Yes,
            minor_hugetlbfs: Answer::Yes,
            exact_address: Answer::Yes,
        }
    }

    fn steps(
        kvm: &Probe,
        userfaultfd: &Result<demand_uffd::Probe, OpenError>,
        total: u64,
        free: u64,
    ) -> Vec<String> {
        let pool = Some(HugePagePool { total, free });
        let pools = [
            (BackingKind::Shmem, None),
            (BackingKind::Hugetlb2M, pool),
            (BackingKind::Hugetlb1G, pool),
        ];
        let found = Found { kvm, userfaultfd, pools: &pools, transparent: true };
        advice(&found).into_iter().map(|advice| advice.step).collect()
    }

    fn kvm(virtualization: Virtualization, userfault: Trial, own_accesses: bool) -> Probe {
        let features = KvmFeatures { userfault, own_accesses, ..Default::default() };
        Probe { virtualization, kvm: Ok(features) }
    }

    #[test]
    fn group_membership_is_read() {
        let users = "root:x:0:0::/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n";
        let groups = "root:x:0:\nkvm:x:104:you,me\nnet:x:105:meme,you\nbad\n";
        assert!(is_member(users, groups, 1000, 104));
        for (user, group) in [(1000, 105), (0, 104), (1001, 104), (1000, 106)] {
            assert!(!is_member(users, groups, user, group), "{user} {group}");
        }
    }

    #[test]
    fn complete_host_gets_no_advice() {
        let best = kvm(Virtualization::Svm, Trial::Works, true);
        let uffd = Ok(uffd(&Answer::Yes));
        assert!(steps(&best, &uffd, 4, 1).is_empty());
        // Pages in use stay in use.
        let steps = steps(&best, &uffd, 4, 0);
        assert_eq!(steps[0], "sysctl -w vm.nr_hugepages=516");
        assert!(steps[1].starts_with("echo 5 > ") && steps.len() == 2, "{steps:?}");
    }

    #[test]
    fn each_lack_comes_with_its_remedy() {
        let expect = |kvm: &Probe, uffd: &Result<_, _>, wanted: &[&str]| {
            let steps = steps(kvm, uffd, 4, 1);
            assert_eq!(steps.len(), wanted.len(), "{steps:?}");
            for (step, wanted) in steps.iter().zip(wanted) {
                assert!(step.contains(wanted) && !step.contains('\n'), "{step}, not: {wanted}");
            }
        };
        let best = kvm(Virtualization::Vmx, Trial::Works, true);
        let all = Ok(uffd(&Answer::Yes));
        expect(
            &kvm(Virtualization::Emulated, Trial::Refused { errno: libc::EINVAL }, false),
            &all,
            &["VMX or AMD SVM", "with KVM Userfault"],
        );
        expect(&kvm(Virtualization::Vmx, Trial::Works, false), &all, &["in all its accesses"]);
        let refused = |errno| Probe {
            virtualization: Virtualization::Svm,
            kvm: Err(match errno {
                libc::ENOENT => KvmError::Absent(kvm_ioctls::Error::new(errno)),
                libc::EACCES => KvmError::Permission(kvm_ioctls::Error::new(errno)),
                _ => KvmError::CreateVm(kvm_ioctls::Error::new(errno)),
            }),
        };
        expect(&refused(libc::ENOENT), &all, &["modprobe"]);
        expect(&refused(libc::EACCES), &all, &["usermod -aG kvm"]);
        expect(&refused(libc::EBUSY), &all, &["another hypervisor"]);
        let denied = |device| {
            Err(OpenError::NotPermitted {
                device: io::Error::from_raw_os_error(device),
                call: io::Error::from_raw_os_error(libc::EPERM),
            })
        };
        expect(&best, &denied(libc::EACCES), &["chmod g+rw /dev/userfaultfd"]);
        expect(&best, &denied(libc::ENOENT), &["vm.unprivileged_userfaultfd=1"]);
        expect(&best, &Ok(uffd(&Answer::No("old".into()))), &["Linux 5.14"]);
    }
}
