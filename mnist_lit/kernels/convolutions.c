/* The tutorial's convolutional part, forward and backward, for images of one channel in single precision:
 *
 *     images [N,1,H,W] -> conv 3x3 -> ReLU -> conv 3x3 -> max-pool 3x3 -> ReLU -> dropout -> features [N,F2,P,Q]
 *
 * Plain C without torch's headers; convolutions.py calls it and has the same in plain PyTorch. Three ideas make it fast:
 *
 * - One image at a time, so that what lies between the layers (90 KB) stays in the cache and never reaches memory.
 * - Forward: a pooling window of 3x3 outputs comes from 5x5 inputs, which is Winograd's F(3x3, 3x3): 25
 *   multiplications a channel instead of 81. (Winograd 1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural
 *   Networks", 2015. Points 0, 1, -1, 2 and infinity.)
 * - Backward: at most one output in nine, the winner of its window, has a gradient, and ReLU and dropout leave fewer
 *   than half of those. Only they are added up, instead of two dense convolutions.
 *
 * The images are dealt out to threads in slices; each sums its gradients on its own, and the sums are added in the
 * order of the slices, so that the same number of threads gives the same bits.
 *
 * Compiled once for each instruction set, with LANES floats to a vector (pyproject.toml).
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

/* The library carries this file, so that library.py can see whether it was compiled from the file as it is now. The symbol
 * is for linkers that leave out what nothing can refer to. */
__asm__(".globl mnist_lit_source\nmnist_lit_source: .incbin \"" __FILE__ "\"");

/* A block of the matrix product: ROWS x VECTORS sums stay in registers, of which AVX-512 has 32 and the others 16. */
#define ROWS 4
#if LANES == 16
#define VECTORS 4
#else
#define VECTORS 2
#endif

/* What the transforms' rounding can amount to, relative to the largest output of a window. */
#define ROUNDING 4e-6f

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

/* Torch's own OpenMP runtime, which is in the process already: threads of a second one would fight with its threads. */
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

struct job {
    long images_count, height, width; /* of the images */
    long f1, f2;                      /* filters of the two convolutions, as asked for */
    long c1, c2;                      /* the same, filled up with zeros to whole blocks of vectors */
    const float *images;
    const uint8_t *kept; /* NULL: dropout keeps everything */
    float scale;         /* what dropout multiplies kept values by */
    float *features;
    uint8_t *winners; /* 0..8: which place of a window the feature comes from */
    const float *gradient;

    float *w1, *b1;             /* [9][c1], [c1] */
    float *w2, *b2;             /* backward: [f2][9][c1]; forward: transformed, [25][c1][c2], and [c2] */
    float *dw1, *db1, *dw2, *db2; /* per slice: [9][c1], [c1], [f2][9][c1], [f2] */
    unsigned slices;
    int failed;
};

INLINE vec at(const float *p) { return *(const vec *)p; }
INLINE void put(float *p, vec x) { *(vec *)p = x; }
INLINE vec splat(float x) { return x - (vec){}; }
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }
INLINE vec positive(vec x, vec of) { return (vec)((ivec)of & ~(x <= 0)); } /* NaN counts as positive, as in torch */

static long up(long n, long to) { return (n + to - 1) / to * to; }
static float *zeros(long count) {
    float *p = aligned_alloc(64, up(4 * count, 64));
    return p ? memset(p, 0, 4 * count) : NULL;
}

/* h [H-2][W-2][c1]: the first convolution and ReLU for one image. */
static void first_layer(const struct job *job, const float *image, float *h) {
    const long rows = job->height - 2, columns = job->width - 2, c1 = job->c1;
    for (long c = 0; c < c1; c += LANES) {
        vec w[9], b = at(job->b1 + c);
        UNROLL for (int k = 0; k < 9; k++) w[k] = at(job->w1 + k * c1 + c);
        for (long y = 0; y < rows; y++)
            for (long x = 0; x < columns; x++) {
                const float *pixel = image + y * job->width + x;
                vec sum = b;
                UNROLL for (int k = 0; k < 9; k++) sum += w[k] * pixel[k / 3 * job->width + k % 3];
                put(h + (y * columns + x) * c1 + c, positive(sum, sum));
            }
    }
}

/* Winograd's transform of five inputs. Written with differences, so that equal inputs give exact zeros: the nine
 * outputs over an even background are then equal to the last bit, and the first of them wins the window, as in torch. */
INLINE void transform_inputs(const vec d[5], vec t[5]) {
    t[0] = 2 * (d[0] - d[2]) + (d[3] - d[1]);
    t[1] = (d[3] - d[2]) - 2 * d[1];
    t[2] = 2 * (d[1] - d[2]) - (d[2] - d[3]);
    t[3] = d[3] - d[1];
    t[4] = 2 * (d[1] - d[3]) + (d[4] - d[2]);
}

/* ... and of the five products back to three outputs. */
INLINE void transform_products(const vec m[5], vec y[3]) {
    vec sum = m[1] + m[2];
    y[0] = m[0] + sum + m[3];
    y[1] = (m[1] - m[2]) + 2 * m[3];
    y[2] = sum + 4 * m[3] + m[4];
}

/* ... and of three weights. */
static void transform_weights(const double w[3], double t[5]) {
    t[0] = w[0] / 2;
    t[1] = -(w[0] + w[1] + w[2]) / 2;
    t[2] = -(w[0] - w[1] + w[2]) / 6;
    t[3] = (w[0] + 2 * w[1] + 4 * w[2]) / 6;
    t[4] = w[2];
}

/* m [25][rows][c2] = v [25][rows][c1] * w [25][c1][c2], for each of the 25 points. */
static void products(const float *v, const float *w, float *m, long rows, long c1, long c2) {
    for (int point = 0; point < 25; point++, v += rows * c1, w += c1 * c2, m += rows * c2)
        for (long r = 0; r < rows; r += ROWS)
            for (long c = 0; c < c2; c += VECTORS * LANES) {
                vec sums[ROWS][VECTORS] = {};
                for (long k = 0; k < c1; k++) {
                    vec weights[VECTORS];
                    UNROLL for (int j = 0; j < VECTORS; j++) weights[j] = at(w + k * c2 + c + j * LANES);
                    UNROLL for (int i = 0; i < ROWS; i++) {
                        vec x = splat(v[(r + i) * c1 + k]);
                        UNROLL for (int j = 0; j < VECTORS; j++) sums[i][j] += x * weights[j];
                    }
                }
                UNROLL for (int i = 0; i < ROWS; i++)
                    UNROLL for (int j = 0; j < VECTORS; j++) put(m + (r + i) * c2 + c + j * LANES, sums[i][j]);
            }
}

/* Largest of the nine outputs of a window and its place, for LANES filters; m [25][stride]. What lies within ROUNDING
 * of the largest counts as equal to it, and the first of equals wins, as in torch: without that, rounding would choose
 * among the outputs that see nothing but background. NaN wins over all. slack: what counts as equal. */
INLINE void pool(const float *m, long stride, float *best, int32_t *place, float *slack) {
    vec half[3][5], y[9], most, size = {};
    ivec which = {};
    UNROLL for (int k = 0; k < 5; k++) {
        vec column[5], three[3];
        UNROLL for (int i = 0; i < 5; i++) column[i] = at(m + (i * 5 + k) * stride);
        transform_products(column, three);
        UNROLL for (int i = 0; i < 3; i++) half[i][k] = three[i];
    }
    UNROLL for (int i = 0; i < 3; i++) transform_products(half[i], y + 3 * i);
    most = y[0];
    UNROLL for (int k = 0; k < 9; k++) {
        most = choose(~(y[k] <= most) & (most == most), y[k], most);
        size = choose(y[k] > size, y[k], size);
        size = choose(-y[k] > size, -y[k], size);
    }
    size *= ROUNDING;
    UNROLL for (int k = 8; k >= 0; k--) {
        ivec largest = (y[k] >= most - size) | (y[k] != y[k]);
        which = (which & ~largest) | (k & largest);
    }
    put(best, most);
    put(slack, size);
    *(ivec *)place = which;
}

static int forward_slice(const struct job *job, long begin, long end) {
    const long columns = job->width - 2, P = (job->height - 4) / 3, Q = (job->width - 4) / 3;
    const long c1 = job->c1, c2 = job->c2, rows = up(Q, ROWS);
    const long sizes[] = {(job->height - 2) * columns * c1, 5 * columns * c1, 25 * rows * c1, 25 * rows * c2, rows * c2};
    float *h = zeros(sizes[0] + sizes[1] + sizes[2] + sizes[3] + 3 * sizes[4]);
    if (!h) return 1;
    float *t = h + sizes[0], *v = t + sizes[1], *m = v + sizes[2], *best = m + sizes[3], *slack = best + sizes[4];
    int32_t *place = (int32_t *)(slack + sizes[4]);

    for (long n = begin; n < end; n++) {
        first_layer(job, job->images + n * job->height * job->width, h);
        for (long p = 0; p < P; p++) { /* a row of Q windows at a time */
            for (long x = 0; x < columns * c1; x += LANES) {
                vec d[5], o[5];
                UNROLL for (int i = 0; i < 5; i++) d[i] = at(h + (3 * p + i) * columns * c1 + x);
                transform_inputs(d, o);
                UNROLL for (int i = 0; i < 5; i++) put(t + i * columns * c1 + x, o[i]);
            }
            for (int i = 0; i < 5; i++)
                for (long q = 0; q < Q; q++)
                    for (long c = 0; c < c1; c += LANES) {
                        vec d[5], o[5];
                        UNROLL for (int k = 0; k < 5; k++) d[k] = at(t + (i * columns + 3 * q + k) * c1 + c);
                        transform_inputs(d, o);
                        UNROLL for (int k = 0; k < 5; k++) put(v + ((i * 5 + k) * rows + q) * c1 + c, o[k]);
                    }
            products(v, job->w2, m, rows, c1, c2);
            for (long q = 0; q < Q; q++)
                for (long c = 0; c < c2; c += LANES)
                    pool(m + q * c2 + c, rows * c2, best + q * c2 + c, place + q * c2 + c, slack + q * c2 + c);
            for (long c = 0; c < job->f2; c++) {
                const long to = ((n * job->f2 + c) * P + p) * Q;
                for (long q = 0; q < Q; q++) {
                    float value = best[q * c2 + c] + job->b2[c];
                    value = value <= slack[q * c2 + c] ? 0 : value * job->scale;
                    job->features[to + q] = job->kept && !job->kept[to + q] ? 0 : value;
                    job->winners[to + q] = place[q * c2 + c];
                }
            }
        }
    }
    free(h);
    return 0;
}

/* Gradients of one filter of the second convolution: w, dw [9][c1]; g [count] at the given places of h and dh. */
INLINE void add_winners(const float *w, float *dw, const float *h, float *dh, long columns, long c1, const float *g,
                        const long *places, long count) {
    for (long c = 0; c < c1; c += 2 * LANES) {
#define EACH UNROLL for (int k = 0; k < 9; k++) UNROLL for (int j = 0; j < 2; j++)
#define OF(array) (array + k * c1 + c + j * LANES)
#define BESIDE(array) (array + places[i] + (k / 3 * columns + k % 3) * c1 + c + j * LANES)
        vec a[9][2];
        EACH a[k][j] = at(OF(dw));
        for (long i = 0; i < count; i++) EACH a[k][j] += g[i] * at(BESIDE(h));
        EACH put(OF(dw), a[k][j]);
        EACH a[k][j] = at(OF(w));
        for (long i = 0; i < count; i++) EACH put(BESIDE(dh), at(BESIDE(dh)) + g[i] * a[k][j]);
    }
}

/* Gradients of the first convolution from those of its output, while they are in the cache. */
INLINE void add_first_layer(const struct job *job, const float *image, const float *h, const float *dh, float *dw,
                            float *db) {
    const long rows = job->height - 2, columns = job->width - 2, c1 = job->c1;
    for (long c = 0; c < c1; c += LANES) {
        vec a[9], b = at(db + c);
        UNROLL for (int k = 0; k < 9; k++) a[k] = at(dw + k * c1 + c);
        for (long y = 0; y < rows; y++)
            for (long x = 0; x < columns; x++) {
                const float *pixel = image + y * job->width + x;
                const long i = (y * columns + x) * c1 + c;
                vec d = positive(at(h + i), at(dh + i));
                b += d;
                UNROLL for (int k = 0; k < 9; k++) a[k] += d * pixel[k / 3 * job->width + k % 3];
            }
        put(db + c, b);
        UNROLL for (int k = 0; k < 9; k++) put(dw + k * c1 + c, a[k]);
    }
}

static int backward_slice(const struct job *job, long begin, long end, long slice) {
    const long columns = job->width - 2, P = (job->height - 4) / 3, Q = (job->width - 4) / 3;
    const long c1 = job->c1, size = (job->height - 2) * columns * c1;
    float *dw1 = job->dw1 + slice * 9 * c1, *db1 = job->db1 + slice * c1;
    float *dw2 = job->dw2 + slice * job->f2 * 9 * c1, *db2 = job->db2 + slice * job->f2;
    float *h = zeros(2 * size + up(Q, LANES));
    long *places = malloc(Q * sizeof(long));
    if (!h || !places) {
        free(h);
        free(places);
        return 1;
    }
    float *dh = h + size, *g = dh + size;
    for (long n = begin; n < end; n++) {
        const float *image = job->images + n * job->height * job->width;
        first_layer(job, image, h);
        memset(dh, 0, 4 * size);
        for (long p = 0; p < P; p++)
            for (long c = 0; c < job->f2; c++) {
                const long from = ((n * job->f2 + c) * P + p) * Q;
                long count = 0;
                for (long q = 0; q < Q; q++) {
                    const long place = job->winners[from + q];
                    const float each = job->gradient[from + q] * job->scale;
                    places[count] = ((3 * p + place / 3) * columns + 3 * q + place % 3) * c1;
                    g[count] = each;
                    /* A gradient that is not finite is never left out, for it means that something went wrong. */
                    count += !(job->features[from + q] <= 0) | !isfinite(each);
                }
                for (long i = 0; i < count; i++) db2[c] += g[i];
                if (count) add_winners(job->w2 + c * 9 * c1, dw2 + c * 9 * c1, h, dh, columns, c1, g, places, count);
            }
        add_first_layer(job, image, h, dh, dw1, db1);
    }
    free(h);
    free(places);
    return 0;
}

/* The widest vectors, in floats, that this CPU and its system have: 16 means all of x86-64-v4, 8 all of x86-64-v3. Only
 * the library for any CPU may be asked, since the others' code may need what they ask for. By hand, because compilers'
 * __builtin_cpu_supports has not known these levels, nor all that belongs to them, for long. */
int mnist_lit_lanes(void) {
#ifdef __x86_64__
    const unsigned v3_1 = bit_SSE3 | bit_SSSE3 | bit_FMA | bit_CMPXCHG16B | bit_SSE4_1 | bit_SSE4_2 | bit_MOVBE |
                          bit_POPCNT | bit_OSXSAVE | bit_AVX | bit_F16C;
    const unsigned v3_7 = bit_BMI | bit_AVX2 | bit_BMI2, v3_extended = bit_LAHF_LM | bit_ABM;
    const unsigned v4_7 = bit_AVX512F | bit_AVX512DQ | bit_AVX512CD | bit_AVX512BW | bit_AVX512VL;
    unsigned a, b, c, d, extended, saved, high; /* saved: the registers that the system keeps for each process */
    if (!__get_cpuid(0x80000001, &a, &b, &extended, &d) || (extended & v3_extended) != v3_extended) return 4;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & v3_1) != v3_1) return 4;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & v3_7) != v3_7) return 4;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & 0x06) != 0x06) return 4;
    return (saved & 0xe6) == 0xe6 && (b & v4_7) == v4_7 ? 16 : 8;
#else
    return 4;
#endif
}

static void work(void *data) {
    struct job *job = data;
    for (long s = omp_get_thread_num(); s < job->slices; s += omp_get_num_threads()) {
        const long begin = job->images_count * s / job->slices, end = job->images_count * (s + 1) / job->slices;
        if (job->gradient ? backward_slice(job, begin, end, s) : forward_slice(job, begin, end))
            __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    }
}

/* The first layer's weights [f1][9] with the filters last, as the vectors want them. */
static void pack_first_layer(struct job *job, const float *w1, const float *b1) {
    for (long c = 0; c < job->f1; c++) {
        job->b1[c] = b1[c];
        for (long k = 0; k < 9; k++) job->w1[k * job->c1 + c] = w1[c * 9 + k];
    }
}

/* Both functions: weights and their gradients as torch has them, w1 [f1][1][3][3], w2 [f2][f1][3][3]; everything
 * contiguous. They return 0, or 1 if there was not enough memory. */

int mnist_lit_forward(unsigned threads, long count, long height, long width, long f1, long f2, const float *images,
                      const float *w1, const float *b1, const float *w2, const float *b2, const uint8_t *kept,
                      float scale, float *features, uint8_t *winners) {
    struct job job = {count, height, width, f1, f2, up(f1, 2 * LANES), up(f2, VECTORS * LANES), images, kept, scale,
                      features, winners, .slices = threads};
    const long c1 = job.c1, c2 = job.c2;
    if (!(job.w1 = zeros(10 * c1 + 25 * c1 * c2 + c2))) return 1;
    job.b1 = job.w1 + 9 * c1;
    job.w2 = job.b1 + c1;
    job.b2 = job.w2 + 25 * c1 * c2;
    pack_first_layer(&job, w1, b1);
    for (long o = 0; o < f2; o++) {
        job.b2[o] = b2[o];
        for (long c = 0; c < f1; c++) {
            double t[3][5], column[3], u[5];
            for (int i = 0; i < 3; i++) {
                for (int k = 0; k < 3; k++) column[k] = w2[(o * f1 + c) * 9 + 3 * i + k];
                transform_weights(column, t[i]);
            }
            for (int k = 0; k < 5; k++) {
                for (int i = 0; i < 3; i++) column[i] = t[i][k];
                transform_weights(column, u);
                for (int i = 0; i < 5; i++) job.w2[((5 * i + k) * c1 + c) * c2 + o] = u[i];
            }
        }
    }
    GOMP_parallel(work, &job, threads, 0);
    free(job.w1);
    return job.failed;
}

int mnist_lit_backward(unsigned threads, long count, long height, long width, long f1, long f2, const float *images,
                       const float *w1, const float *b1, const float *w2, float scale, const float *features,
                       const uint8_t *winners, const float *gradient, float *dw1, float *db1, float *dw2, float *db2) {
    struct job job = {count, height, width, f1, f2, up(f1, 2 * LANES), .images = images, .scale = scale,
                      .features = (float *)features, .winners = (uint8_t *)winners, .gradient = gradient,
                      .slices = threads};
    const long c1 = job.c1, slice = 10 * c1 + f2 * 9 * c1 + f2;
    if (!(job.w1 = zeros(10 * c1 + f2 * 9 * c1 + threads * slice))) return 1;
    job.b1 = job.w1 + 9 * c1;
    job.w2 = job.b1 + c1;
    job.dw1 = job.w2 + f2 * 9 * c1;
    job.db1 = job.dw1 + threads * 9 * c1;
    job.dw2 = job.db1 + threads * c1;
    job.db2 = job.dw2 + threads * f2 * 9 * c1;
    pack_first_layer(&job, w1, b1);
    for (long o = 0; o < f2; o++)
        for (long c = 0; c < f1; c++)
            for (long k = 0; k < 9; k++) job.w2[(o * 9 + k) * c1 + c] = w2[(o * f1 + c) * 9 + k];
    GOMP_parallel(work, &job, threads, 0);
    memset(dw1, 0, 4 * f1 * 9), memset(db1, 0, 4 * f1), memset(dw2, 0, 4 * f2 * f1 * 9), memset(db2, 0, 4 * f2);
    for (long s = 0; s < threads; s++) {
        for (long c = 0; c < f1; c++) {
            db1[c] += job.db1[s * c1 + c];
            for (long k = 0; k < 9; k++) dw1[c * 9 + k] += job.dw1[(s * 9 + k) * c1 + c];
        }
        for (long o = 0; o < f2; o++) {
            db2[o] += job.db2[s * f2 + o];
            for (long c = 0; c < f1; c++)
                for (long k = 0; k < 9; k++)
                    dw2[(o * f1 + c) * 9 + k] += job.dw2[((s * f2 + o) * 9 + k) * c1 + c];
        }
    }
    free(job.w1);
    return job.failed;
}
