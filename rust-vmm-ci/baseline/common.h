// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// What all baselines need: options, memory, the image, the clock, userfaultfd. No error is handled:
// each ends the program.
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define UNIT (2ul << 20)

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21u << 26)
#endif
#ifndef UFFD_FEATURE_MINOR_SHMEM
#define UFFD_FEATURE_MINOR_SHMEM (1 << 10)
#endif

// -m MiB for each vCPU or toucher, -v vCPUs, -b shmem|hugetlb, -i image, -u bytes of one fault,
// -n pages that each vCPU touches (all), -c copy from the mapped image, -s never sleep between faults
static struct {
    uint64_t size, per_cpu, unit, touches;
    int cpus, hugetlb, copy, spin;
    const char *image;
} opt = { .per_cpu = 16 << 20, .cpus = 1, .unit = PAGE };

static int image_fd;
static int memory_fd;
static char *populate; // where content is written; nothing traps here
static char *guest;    // where the guest, or whoever is measured, looks

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

// Processor time so far: of this process, and of the handler's if there is one.
static clockid_t handler_clock = CLOCK_PROCESS_CPUTIME_ID;

static inline uint64_t cpu_time(void)
{
    struct timespec ours, handlers = { 0 };
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ours);
    if (handler_clock != CLOCK_PROCESS_CPUTIME_ID)
        clock_gettime(handler_clock, &handlers);
    return (ours.tv_sec + handlers.tv_sec) * 1000000000ull + ours.tv_nsec + handlers.tv_nsec;
}

static void options(int argc, char **argv)
{
    int c;
    while ((c = getopt(argc, argv, "m:v:b:i:u:n:cs")) != -1) {
        switch (c) {
        case 'm': opt.per_cpu = strtoull(optarg, NULL, 0) << 20; break;
        case 'v': opt.cpus = atoi(optarg); break;
        case 'b': opt.hugetlb = !strcmp(optarg, "hugetlb"); break;
        case 'i': opt.image = optarg; break;
        case 'u': opt.unit = strtoull(optarg, NULL, 0); break;
        case 'n': opt.touches = strtoull(optarg, NULL, 0); break;
        case 'c': opt.copy = 1; break;
        case 's': opt.spin = 1; break;
        default: exit(2);
        }
    }
    opt.size = opt.per_cpu * opt.cpus;
    if (!opt.touches)
        opt.touches = opt.per_cpu / PAGE;
    struct stat st;
    if (!opt.image || (image_fd = open(opt.image, O_RDONLY)) < 0 || fstat(image_fd, &st))
        err(1, "image %s", opt.image);
    if ((uint64_t)st.st_size < opt.size)
        errx(1, "image %s is too small", opt.image);
}

static char *map(int fd)
{
    char *p = mmap(NULL, opt.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (p == MAP_FAILED)
        err(1, "mmap");
    if (!opt.hugetlb)
        madvise(p, opt.size, MADV_NOHUGEPAGE);
    return p;
}

// One memory object, two mappings.
static void make_memory(void)
{
    memory_fd = memfd_create("memory", opt.hugetlb ? MFD_HUGETLB | MFD_HUGE_2MB : 0);
    if (memory_fd < 0 || ftruncate(memory_fd, opt.size))
        err(1, "memfd");
    populate = map(memory_fd);
    guest = map(memory_fd);
}

// The content of `len` bytes at `offset`, from the image straight into the memory.
static inline void fetch(uint64_t offset, uint64_t len)
{
    if (pread(image_fd, populate + offset, len, offset) != (ssize_t)len)
        err(1, "pread");
}

static inline int open_uffd(void)
{
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = { .api = UFFD_API };
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
        err(1, "userfaultfd");
    return fd;
}

static inline void arm(int uffd, void *at, uint64_t len, uint64_t mode)
{
    struct uffdio_register r = { .range = { (uint64_t)at, len }, .mode = mode };
    if (ioctl(uffd, UFFDIO_REGISTER, &r))
        err(1, "UFFDIO_REGISTER");
}

static inline void map_present(int uffd, uint64_t at, uint64_t len)
{
    struct uffdio_continue c = { .range = { at, len } };
    if (ioctl(uffd, UFFDIO_CONTINUE, &c))
        err(1, "UFFDIO_CONTINUE");
}

// Waits for a fault; returns its address, cut to the unit.
static inline uint64_t next_fault(int uffd)
{
    struct uffd_msg m;
    for (;;) {
        struct pollfd p = { .fd = uffd, .events = POLLIN };
        if (!opt.spin && poll(&p, 1, -1) < 0)
            err(1, "poll");
        if (read(uffd, &m, sizeof(m)) == sizeof(m) && m.event == UFFD_EVENT_PAGEFAULT)
            return m.arg.pagefault.address & ~(opt.unit - 1);
    }
}

// The same numbers as the bench's: the finalizer of MurmurHash3.
static inline uint64_t scatter(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

// Offset of the word that vCPU `cpu` touches in its page `page`.
static inline uint64_t touch(int cpu, uint64_t page)
{
    return page * PAGE + scatter(~page ^ cpu) % (PAGE / 4) * 4;
}

static inline uint32_t image_word(uint64_t offset)
{
    uint32_t word;
    if (pread(image_fd, &word, 4, offset) != 4)
        err(1, "pread");
    return word;
}
