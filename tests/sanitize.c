/* Calls the kernel with random sizes, for sanitize.py. Every array is an allocation of its own, of exactly the size that
 * the kernel may touch, so that the address sanitizer sees each step beyond it. */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int mnist_lit_forward(unsigned threads, long count, long height, long width, long f1, long f2, const float *images,
                      const float *w1, const float *b1, const float *w2, const float *b2, const uint8_t *kept,
                      float scale, float *features, uint8_t *winners);
int mnist_lit_backward(unsigned threads, long count, long height, long width, long f1, long f2, const float *images,
                       const float *w1, const float *b1, const float *w2, float scale, const float *features,
                       const uint8_t *winners, const float *gradient, float *dw1, float *db1, float *dw2, float *db2);

/* OpenMP's part in the kernel with threads that the thread sanitizer knows. */
struct member {
    pthread_t thread;
    void (*work)(void *);
    void *data;
    int number, count;
};
static _Thread_local struct member *self;

static void *run(void *member) {
    self = member;
    self->work(self->data);
    return NULL;
}

void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    struct member *team = calloc(threads, sizeof *team);
    (void)flags;
    for (unsigned i = 0; i < threads; i++) {
        team[i] = (struct member){.work = work, .data = data, .number = i, .count = threads};
        if (pthread_create(&team[i].thread, NULL, run, team + i)) abort();
    }
    for (unsigned i = 0; i < threads; i++) pthread_join(team[i].thread, NULL);
    free(team);
}
int omp_get_thread_num(void) { return self->number; }
int omp_get_num_threads(void) { return self->count; }

/* The kernel's allocations (sanitize.py renames them), of which those from the given one on fail. */
static int allocations, enough;
void *limited_alloc(size_t alignment, size_t size) {
    void *p;
    if (__atomic_fetch_add(&allocations, 1, __ATOMIC_RELAXED) >= enough) return NULL;
    return posix_memalign(&p, alignment, size) ? NULL : p;
}

static long up_to(long least, long most) { return least + rand() % (most - least + 1); }

static float *floats(long count) {
    float *p = malloc(count * sizeof *p);
    for (long i = 0; i < count; i++) p[i] = rand() % 2001 / 1000.f - 1;
    return p;
}

static void one_case(int number) {
    const int fails = number % 5 == 0;
    const unsigned threads = up_to(1, 4);
    const long count = up_to(0, 5), height = up_to(7, 30), width = up_to(7, 30), f1 = up_to(1, 40), f2 = up_to(1, 70);
    const long size = count * f2 * ((height - 4) / 3) * ((width - 4) / 3);
    float *images = floats(count * height * width), *w1 = floats(f1 * 9), *b1 = floats(f1), *w2 = floats(f2 * f1 * 9);
    float *b2 = floats(f2), *features = floats(size), *gradient = floats(size);
    float *dw1 = floats(f1 * 9), *db1 = floats(f1), *dw2 = floats(f2 * f1 * 9), *db2 = floats(f2);
    uint8_t *kept = number % 4 ? malloc(size) : NULL, *winners = calloc(size, 1);
    for (long i = 0; kept && i < size; i++) kept[i] = number % 4 == 1 ? 0 : number % 4 == 2 ? 1 : rand() % 2;

    allocations = 0, enough = fails ? (int)up_to(0, 2) : 1000;
    int failed = mnist_lit_forward(threads, count, height, width, f1, f2, images, w1, b1, w2, b2, kept, 2, features,
                                   winners);
    allocations = 0;
    failed |= mnist_lit_backward(threads, count, height, width, f1, f2, images, w1, b1, w2, 2, features, winners,
                                 gradient, dw1, db1, dw2, db2);
    if (failed && !fails) abort();
    void *all[] = {images, w1, b1, w2, b2, features, gradient, dw1, db1, dw2, db2, kept, winners};
    for (unsigned i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

int main(int count, char **arguments) {
    const int cases = count > 1 ? atoi(arguments[1]) : 100;
    for (int i = 0; i < cases; i++) one_case(i);
    printf("%d cases\n", cases);
    return 0;
}
