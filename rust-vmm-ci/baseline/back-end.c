// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A back-end's fault with the least code: a thread of the same process reads the fault, reads the
// unit through the other mapping, and maps it where the back-end looks.
#include "common.h"

#include "touch.h"

static int uffd;

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
    options(argc, argv);
    make_memory();
    uffd = open_uffd();
    arm(uffd, guest, opt.size, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
    pthread_t thread;
    pthread_create(&thread, NULL, handler, NULL);
    return touch_all();
}
