// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A back-end's fault with the least code: a thread of the same process reads the fault, reads the
// unit through the other mapping, and maps it where the back-end looks. With -c it copies the unit
// from the mapped image with UFFDIO_COPY instead, which saves the zeroing. The image's pages are
// mapped with one call before, which saves a page fault for every 16 of them.
#include "common.h"

#include "touch.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

static int uffd;

static void *handler(void *arg)
{
    char *image = mmap(NULL, opt.size, PROT_READ, MAP_SHARED, image_fd, 0);
    if (image == MAP_FAILED)
        err(1, "map the image");
    for (;;) {
        uint64_t at = next_fault(uffd);
        if (opt.copy) {
            char *source = image + (at - (uint64_t)guest);
            if (madvise(source, opt.unit, MADV_POPULATE_READ))
                err(1, "MADV_POPULATE_READ");
            struct uffdio_copy c = { .dst = at, .src = (uint64_t)source, .len = opt.unit };
            if (ioctl(uffd, UFFDIO_COPY, &c))
                err(1, "UFFDIO_COPY");
            continue;
        }
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
