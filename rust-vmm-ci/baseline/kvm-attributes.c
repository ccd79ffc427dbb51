// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Memory attributes with the least code: missing pages are private, and the slot has no private
// memory. Exit, read the page, [shmem: map it,] make it shared, run again.
#include "guest.h"

#define PRIVATE (1ul << 3)

static int uffd = -1;

static void set_attributes(uint64_t gpa, uint64_t size, uint64_t attributes)
{
    struct { // struct kvm_memory_attributes
        uint64_t address, size, attributes, flags;
    } a = { gpa, size, attributes, 0 };
    if (ioctl(vm, _IOW(KVMIO, 0xd2, a), &a))
        err(3, "KVM_SET_MEMORY_ATTRIBUTES");
}

static void resolve(uint64_t gpa, uint64_t flags)
{
    uint64_t offset = gpa - MEMORY_ADDRESS;
    if (flags != PRIVATE)
        errx(1, "flags %lx", flags);
    fetch(offset, PAGE);
    if (!opt.hugetlb)
        map_present(uffd, (uint64_t)guest + offset, PAGE);
    set_attributes(gpa, PAGE, 0);
}

int main(int argc, char **argv)
{
    started = now();
    options(argc, argv);
    make_memory();
    if (!opt.hugetlb) {
        uffd = open_uffd();
        arm(uffd, guest, opt.size, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
    }
    make_vm(1); // KVM_X86_SW_PROTECTED_VM
    make_slot(0, MEMORY_ADDRESS, opt.size, guest);
    set_attributes(MEMORY_ADDRESS, opt.size, PRIVATE);
    return measure();
}
