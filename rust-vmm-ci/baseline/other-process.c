// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A guest whose pages come from another process: see other-process.h.
#include "guest.h"

#include "other-process.h"

static void resolve(uint64_t gpa, uint64_t flags)
{
    errx(1, "unexpected exit at %lx, flags %lx", gpa, flags);
}

int main(int argc, char **argv)
{
    started = now();
    options(argc, argv);
    if (opt.hugetlb)
        opt.unit = UNIT;
    int socket = start_handler();
    make_memory();
    int uffd = open_uffd();
    arm(uffd, guest, opt.size, UFFDIO_REGISTER_MODE_MISSING);
    struct told told = { (uint64_t)guest };
    pass_message(socket, 1, &told, &uffd);
    make_vm(0);
    make_slot(0, MEMORY_ADDRESS, opt.size, guest);
    return measure();
}
