// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// What the content of a page costs apart from its fault: the kernel's copy of 4K, as pread has it,
// and the kernel's zeroing of 4K as a part of a new huge page.
#define _GNU_SOURCE
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define UNIT (2 << 20)
#define UNITS 8

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

// A pread of `len` bytes into memory that is there, on the average of many.
static double read_time(int fd, char *to, size_t len)
{
    enum { COUNT = 4096 };
    uint64_t begun = now();
    for (int i = 0; i < COUNT; i++)
        if (pread(fd, to, len, 0) != (ssize_t)len)
            err(1, "pread");
    return (double)(now() - begun) / COUNT;
}

int main(void)
{
    static char page[PAGE];
    int fd = memfd_create("image", 0);
    if (fd < 0 || write(fd, page, PAGE) != PAGE)
        err(1, "image");
    read_time(fd, page, PAGE);
    double copy = read_time(fd, page, PAGE) - read_time(fd, page, 1);
    char *huge = mmap(NULL, UNITS * UNIT, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (21 << 26), -1, 0);
    if (huge == MAP_FAILED)
        err(3, "huge pages");
    uint64_t begun = now();
    for (int i = 0; i < UNITS; i++)
        *(volatile char *)(huge + (size_t)i * UNIT) = 1;
    double zero = (double)(now() - begun) / UNITS / (UNIT / PAGE);
    printf("{\"copy\":%.0f,\"zero\":%.0f}\n", copy, zero);
    return 0;
}
