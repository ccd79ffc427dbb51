// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The handler as others have it: another process, which is sent the userfaultfd over a Unix
// socket, maps the image, and with one thread copies from there with UFFDIO_COPY.
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

struct told {
    uint64_t base; // where the memory lies in the process that is served
};

static void pass_message(int socket, int send, struct told *told, int *fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = { told, sizeof(*told) };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
                        .msg_controllen = sizeof(control.bytes) };
    if (send) {
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), fd, sizeof(int));
        if (sendmsg(socket, &m, 0) < 0)
            err(1, "sendmsg");
        return;
    }
    if (recvmsg(socket, &m, 0) <= 0)
        err(1, "recvmsg");
    memcpy(fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(int));
}

static void serve(int socket)
{
    struct told told;
    int uffd;
    pass_message(socket, 0, &told, &uffd);
    char *image = mmap(NULL, opt.size, PROT_READ, MAP_PRIVATE, image_fd, 0);
    if (image == MAP_FAILED)
        err(1, "map the image");
    for (;;) {
        uint64_t at = next_fault(uffd);
        struct uffdio_copy c = { .dst = at, .src = (uint64_t)image + (at - told.base),
                                 .len = opt.unit };
        if (ioctl(uffd, UFFDIO_COPY, &c))
            err(1, "UFFDIO_COPY");
    }
}

// Starts the process. It must be started before there is memory, or it would have that too.
static inline int start_handler(void)
{
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
        err(1, "socketpair");
    pid_t parent = getpid(), child = fork();
    if (child < 0)
        err(1, "fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
        serve(ends[1]);
    }
    clock_getcpuclockid(child, &handler_clock);
    close(ends[1]);
    return ends[0];
}
