// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// KVM Userfault with the least code: exit, read the page, [shmem: map it for KVM's own accesses,]
// clear the bit, run again.
#include "guest.h"

static _Atomic uint64_t *bitmap;
static int uffd = -1;

static void resolve(uint64_t gpa, uint64_t flags)
{
    uint64_t offset = gpa - MEMORY_ADDRESS, page = offset / PAGE;
    if (flags != 1 << 4)
        errx(1, "flags %lx", flags);
    fetch(offset, PAGE);
    if (!opt.hugetlb)
        map_present(uffd, (uint64_t)guest + offset, PAGE);
    atomic_fetch_and_explicit(&bitmap[page / 64], ~(1ul << page % 64), memory_order_release);
}

int main(int argc, char **argv)
{
    started = now();
    options(argc, argv);
    make_memory();
    uint64_t bytes = (opt.size / PAGE + 63) / 64 * 8;
    bitmap = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memset((void *)bitmap, 0xff, bytes);
    if (!opt.hugetlb) {
        uffd = open_uffd();
        arm(uffd, guest, opt.size, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
    }
    make_vm(0);
    // struct kvm_userspace_memory_region2 with the series' field, which headers do not have.
    struct {
        uint32_t slot, flags;
        uint64_t gpa, size, at, guest_memfd_offset;
        uint32_t guest_memfd, pad1;
        uint64_t userfault_bitmap, pad2[13];
    } region = { 0, 1 << 3, MEMORY_ADDRESS, opt.size, (uint64_t)guest,
                 .userfault_bitmap = (uint64_t)bitmap };
    if (ioctl(vm, _IOW(KVMIO, 0x49, region), &region))
        err(3, "KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_USERFAULT");
    return measure();
}
