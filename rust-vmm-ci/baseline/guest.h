// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The guest of `demand-vmm bench`, to the byte, and the loop around it. A baseline defines what
// happens at a missing page: resolve(), called on the vCPU's thread.
#include "common.h"

#include <linux/kvm.h>

#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif
#define MEMORY_ADDRESS (4ul << 30)

static const unsigned char code[] = {
    0x48, 0x8b, 0x44, 0xce, 0xf8, // warm: mov rax, [rsi + rcx * 8 - 8]
    0x48, 0xff, 0xc9,             //       dec rcx
    0x75, 0xf6,                   //       jne warm
    0xe6, 0x20,                   //       out 0x20, al
    0x48, 0x89, 0xe9,             //       mov rcx, rbp
    0x48, 0x8b, 0x3e,             // next: mov rdi, [rsi]
    0x48, 0x83, 0xc6, 0x08,       //       add rsi, 8
    0x8b, 0x07,                   //       mov eax, [rdi]
    0xc1, 0xc3, 0x05,             //       rol ebx, 5
    0x01, 0xc3,                   //       add ebx, eax
    0x48, 0xff, 0xc9,             //       dec rcx
    0x75, 0xed,                   //       jne next
    0xf4,                         //       hlt
};

static int kvm, vm;
static int kvm_run_size;
static uint64_t started, first_run, slot_ns; // slot_ns: of the memory's slot
static pthread_barrier_t ready;

struct vcpu {
    pthread_t thread;
    int fd, index;
    struct kvm_run *run;
    uint64_t begun, ended, cpu_begun, cpu_ended;
};

static void resolve(uint64_t gpa, uint64_t flags);

static void make_vm(unsigned long type)
{
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0 || (vm = ioctl(kvm, KVM_CREATE_VM, type)) < 0)
        err(3, "kvm");
    kvm_run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
}

static inline void make_slot(uint32_t slot, uint64_t gpa, uint64_t size, void *at)
{
    struct kvm_userspace_memory_region r = { slot, 0, gpa, size, (uint64_t)at };
    uint64_t begun = now();
    if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r))
        err(1, "KVM_SET_USER_MEMORY_REGION");
    if (slot == 0)
        slot_ns = now() - begun;
}

// Code at 0, page tables (2 MiB pages, identity), tables of addresses.
static void make_control(void)
{
    uint64_t gigabytes = (MEMORY_ADDRESS + opt.size + (1ul << 30) - 1) >> 30;
    uint64_t tables = (3 + gigabytes) * PAGE;
    uint64_t len = (tables + opt.cpus * opt.touches * 8 + PAGE - 1) & ~(PAGE - 1);
    char *c = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (c == MAP_FAILED)
        err(1, "mmap");
    memcpy(c, code, sizeof(code));
    ((uint64_t *)(c + PAGE))[0] = 2 * PAGE | 0x23;
    for (uint64_t g = 0; g < gigabytes; g++) {
        ((uint64_t *)(c + 2 * PAGE))[g] = (3 + g) * PAGE | 0x23;
        for (uint64_t p = 0; p < 512; p++)
            ((uint64_t *)(c + (3 + g) * PAGE))[p] = g << 30 | p << 21 | 0xe3;
    }
    uint64_t *table = (uint64_t *)(c + tables);
    for (int cpu = 0; cpu < opt.cpus; cpu++)
        for (uint64_t page = 0; page < opt.touches; page++)
            *table++ = MEMORY_ADDRESS + cpu * opt.per_cpu + touch(cpu, page);
    make_slot(1, 0, len, c);
}

static void make_vcpu(struct vcpu *v, int index)
{
    v->index = index;
    v->fd = ioctl(vm, KVM_CREATE_VCPU, index);
    if (v->fd < 0)
        err(1, "KVM_CREATE_VCPU");
    v->run = mmap(NULL, kvm_run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid = { .head.nent = 256 };
    if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) || ioctl(v->fd, KVM_SET_CPUID2, &cpuid))
        err(1, "CPUID");
    struct kvm_sregs s;
    ioctl(v->fd, KVM_GET_SREGS, &s);
    struct kvm_segment flat = { .limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1,
                                .l = 1, .g = 1 };
    s.cs = flat;
    flat.selector = 16, flat.type = 3, flat.l = 0, flat.db = 1;
    s.ds = s.es = s.ss = flat;
    s.idt.limit = 0;
    s.cr3 = PAGE;
    s.cr4 = 1 << 5;
    s.efer = 1 << 8 | 1 << 10;
    s.cr0 = 1 | 1 << 4 | 1 << 16 | 1ul << 31;
    uint64_t gigabytes = (MEMORY_ADDRESS + opt.size + (1ul << 30) - 1) >> 30;
    struct kvm_regs r = { .rsi = (3 + gigabytes) * PAGE + index * opt.touches * 8,
                          .rcx = opt.touches, .rbp = opt.touches, .rflags = 2 };
    if (ioctl(v->fd, KVM_SET_SREGS, &s) || ioctl(v->fd, KVM_SET_REGS, &r))
        err(1, "registers");
}

// Runs until the guest is ready (port 0x20) or halts, with missing pages on the way.
static void run(struct vcpu *v)
{
    for (;;) {
        ioctl(v->fd, KVM_RUN, 0);
        switch (v->run->exit_reason) {
        case KVM_EXIT_MEMORY_FAULT:
            // flags, gpa, size: kernel headers before 6.8 have no name for them
            resolve((&v->run->hw.hardware_exit_reason)[1], v->run->hw.hardware_exit_reason);
            break;
        case KVM_EXIT_IO:
        case KVM_EXIT_HLT: return;
        default: errx(1, "exit %d", v->run->exit_reason);
        }
    }
}

static void *vcpu_thread(void *arg)
{
    struct vcpu *v = arg;
    run(v);
    pthread_barrier_wait(&ready);
    v->cpu_begun = cpu_time();
    v->begun = now();
    run(v);
    v->ended = now();
    v->cpu_ended = cpu_time();
    return NULL;
}

// Measures, checks what the guest has read, and prints a line of JSON.
static int measure(void)
{
    struct vcpu v[opt.cpus];
    pthread_barrier_init(&ready, NULL, opt.cpus);
    make_control();
    for (int i = 0; i < opt.cpus; i++)
        make_vcpu(&v[i], i);
    first_run = now();
    for (int i = 0; i < opt.cpus; i++)
        pthread_create(&v[i].thread, NULL, vcpu_thread, &v[i]);
    uint64_t begun = ~0ul, ended = 0, cpu_begun = ~0ul, cpu_ended = 0;
    for (int i = 0; i < opt.cpus; i++) {
        pthread_join(v[i].thread, NULL);
        begun = v[i].begun < begun ? v[i].begun : begun;
        ended = v[i].ended > ended ? v[i].ended : ended;
        cpu_begun = v[i].cpu_begun < cpu_begun ? v[i].cpu_begun : cpu_begun;
        cpu_ended = v[i].cpu_ended > cpu_ended ? v[i].cpu_ended : cpu_ended;
        struct kvm_regs r;
        ioctl(v[i].fd, KVM_GET_REGS, &r);
        uint32_t hash = 0;
        for (uint64_t page = 0; page < opt.touches; page++)
            hash = (hash << 5 | hash >> 27) + image_word(i * opt.per_cpu + touch(i, page));
        if (hash != (uint32_t)r.rbx)
            errx(1, "vCPU %d read something else than the image holds", i);
    }
    uint64_t pages = opt.touches * opt.cpus;
    printf("{\"pages\":%lu,\"time_ns\":%lu,\"cpu_time_ns\":%lu,\"ns_per_page\":%.1f,"
           "\"time_to_first_instruction_us\":%lu,\"slot_ns\":%lu}\n", pages, ended - begun,
           cpu_ended - cpu_begun, (double)(ended - begun) / pages, (first_run - started) / 1000,
           slot_ns);
    return 0;
}
