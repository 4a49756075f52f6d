/**
 * One notification, shown once: what this browser has shown already, in IndexedDB, which tabs and service workers share.
 * A file of its own (`@carillon/client/ledger`), because a service worker wants it without the client.
 */

/** Longer than a push provider keeps a message for a device that is off (FCM: four weeks). */
const KEPT_MS = 30 * 24 * 3_600_000;
const STORE = "shown";
/** Old ones that one claim forgets: more than it adds, and never a long transaction. */
const FORGOTTEN_MAX = 100;

/**
 * Whether it is the first to show this notification, in whichever tab or service worker: true for one caller only.
 *
 * @param id the notification's id, as in `notification.id` and in a push's `notificationId`.
 * @param name database. Of two users of one browser each has notifications of their own, so it needs no user.
 * @returns true also where there is no IndexedDB (private windows of some browsers): rather twice than never.
 */
export async function claim(id: string, name = "carillon"): Promise<boolean> {
  let database: IDBDatabase | undefined;
  try {
    database = await new Promise<IDBDatabase>((resolve, reject) => {
      const opening = indexedDB.open(name, 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore(STORE).createIndex("at", "");
      opening.onsuccess = () => resolve(opening.result);
      opening.onerror = opening.onblocked = () => reject(opening.error);
    });
    const store = database.transaction(STORE, "readwrite").objectStore(STORE);
    const old = store.index("at").getAllKeys(IDBKeyRange.upperBound(Date.now() - KEPT_MS), FORGOTTEN_MAX);
    old.onsuccess = () => old.result.forEach((key) => store.delete(key));
    return await new Promise<boolean>((resolve, reject) => {
      const adding = store.add(Date.now(), id); // the value is when it was claimed
      adding.onsuccess = () => resolve(true);
      adding.onerror = () => (adding.error!.name === "ConstraintError" ? resolve(false) : reject(adding.error));
    });
  } catch {
    return true;
  } finally {
    database?.close();
  }
}
