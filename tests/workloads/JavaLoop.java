import java.io.FileOutputStream;
import java.nio.charset.StandardCharsets;
import java.util.HashMap;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.zip.CRC32;

/**
 * A Java program that checks itself: threads that allocate (so the collector runs), checksummed buffers, a queue between
 * threads. Run as: java JavaLoop.java STATUS_FILE. One JSON line per note, the fields that the Python workloads have.
 */
public class JavaLoop {
    static volatile long errors = 0;
    static volatile long allocated = 0;
    static volatile long checked = 0;
    static volatile long passed = 0;

    static long sum(byte[] bytes) {
        CRC32 crc = new CRC32();
        crc.update(bytes);
        return crc.getValue();
    }

    static void allocate() {
        try {
            HashMap<Integer, String> map = new HashMap<>();
            for (int i = 0; ; i++) {
                map.put(i % 5000, "value " + i);
                if (i >= 5000 && !map.get((i + 1) % 5000).equals("value " + (i - 4999))) {
                    errors++;
                }
                allocated++;
                if (i % 500 == 0) {
                    Thread.sleep(5);
                }
            }
        } catch (InterruptedException e) {
            errors++;
        }
    }

    static void verify() {
        try {
            byte[][] blocks = new byte[64][65536];
            long[] sums = new long[64];
            for (int i = 0; i < 64; i++) {
                sums[i] = sum(blocks[i]);
            }
            for (int i = 0; ; i++) {
                int n = i * 7 % 64;
                if (sum(blocks[n]) != sums[n]) {
                    errors++;
                }
                blocks[n][i * 31 % 65536]++;
                sums[n] = sum(blocks[n]);
                checked++;
                Thread.sleep(2);
            }
        } catch (InterruptedException e) {
            errors++;
        }
    }

    static final ConcurrentLinkedQueue<Long> queue = new ConcurrentLinkedQueue<>();

    static void produce() {
        try {
            for (long i = 0; ; i++) {
                queue.add(i);
                Thread.sleep(3);
            }
        } catch (InterruptedException e) {
            errors++;
        }
    }

    static void consume() {
        try {
            while (true) {
                Long next = queue.poll();
                if (next == null) {
                    Thread.sleep(1);
                } else if (next != passed) {
                    errors++;
                } else {
                    passed++;
                }
            }
        } catch (InterruptedException e) {
            errors++;
        }
    }

    public static void main(String[] arguments) throws Exception {
        Runnable[] jobs = {JavaLoop::allocate, JavaLoop::verify, JavaLoop::produce, JavaLoop::consume};
        for (Runnable job : jobs) {
            Thread thread = new Thread(job);
            thread.setDaemon(true);
            thread.start();
        }
        long pid = ProcessHandle.current().pid();
        try (FileOutputStream out = new FileOutputStream(arguments[0], true)) {
            for (long sequence = 1; ; sequence++) {
                String host = new String(
                    new java.io.FileInputStream("/proc/sys/kernel/hostname").readAllBytes(),
                    StandardCharsets.UTF_8).strip();
                String line = String.format(
                    "{\"sequence\": %d, \"pid\": %d, \"host\": \"%s\", \"realtime_ns\": %d, \"nr_errors\": %d, "
                        + "\"allocated\": %d, \"checked\": %d, \"passed\": %d}\n",
                    sequence, pid, host, System.currentTimeMillis() * 1000000L, errors, allocated, checked, passed);
                out.write(line.getBytes(StandardCharsets.UTF_8));
                Thread.sleep(50);
            }
        }
    }
}
