// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A back-end that touches one word of each of its units, in order, and measures each touch.
static int touch_all(void)
{
    uint64_t units = opt.size / opt.unit;
    uint32_t *latency = malloc(units * sizeof(*latency)); // ns
    for (uint64_t i = 0; i < units; i++) {
        uint64_t offset = i * opt.unit + touch(0, i) % opt.unit, begun = now();
        uint32_t word = *(volatile uint32_t *)(guest + offset);
        latency[i] = now() - begun;
        if (word != image_word(offset))
            errx(1, "the word at %lx is not the image's", offset);
    }
    for (uint64_t i = 0; i < units; i++)
        printf("%u\n", latency[i]);
    return 0;
}
