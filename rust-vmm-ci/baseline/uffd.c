// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// userfaultfd with the least code: one thread of this process reads a fault, reads the page (on
// huge pages: the unit) through the other mapping, and maps it where the guest looks.
#include "guest.h"

static int uffd;

static void resolve(uint64_t gpa, uint64_t flags)
{
    errx(1, "unexpected exit at %lx, flags %lx", gpa, flags);
}

static void *handler(void *arg)
{
    for (;;) {
        uint64_t at = next_fault(uffd);
        fetch(at - (uint64_t)guest, opt.unit);
        map_present(uffd, at, opt.unit);
    }
    return arg;
}

int main(int argc, char **argv)
{
    started = now();
    options(argc, argv);
    if (opt.hugetlb)
        opt.unit = UNIT;
    make_memory();
    uffd = open_uffd();
    arm(uffd, guest, opt.size, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
    pthread_t thread;
    pthread_create(&thread, NULL, handler, NULL);
    make_vm(0);
    make_slot(0, MEMORY_ADDRESS, opt.size, guest);
    return measure();
}
