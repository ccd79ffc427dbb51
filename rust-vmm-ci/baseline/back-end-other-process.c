// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A back-end whose units come from another process: see other-process.h.
#include "common.h"

#include "other-process.h"
#include "touch.h"

int main(int argc, char **argv)
{
    options(argc, argv);
    int socket = start_handler();
    make_memory();
    int uffd = open_uffd();
    arm(uffd, guest, opt.size, UFFDIO_REGISTER_MODE_MISSING);
    struct told told = { (uint64_t)guest };
    pass_message(socket, 1, &told, &uffd);
    return touch_all();
}
